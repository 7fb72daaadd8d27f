"""The command line. Nothing at module level imports torch."""
