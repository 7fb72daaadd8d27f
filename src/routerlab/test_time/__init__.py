"""Routing that is changed when a trained model is used."""
