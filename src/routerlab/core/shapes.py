"""The letters of every shape annotation in routerlab.

=====  =====================================  =====  =====================================
``B``  sequences in a batch                   ``K``  experts a token picks (``top_k``)
``S``  tokens in a sequence                   ``N``  assignments; ``T * K`` if none is lost
``T``  tokens, ``B * S``                      ``C``  slots of an expert (``expert_capacity``)
``D``  model width (``d_model``)              ``L``  layers
``F``  hidden width of an expert (``d_ff``)   ``H``  attention heads
``E``  experts (``num_experts``)              ``V``  vocabulary
=====  =====================================  =====  =====================================

A signature ``Float[Tensor, "T E"]`` (jaxtyping) is checked at run time in the test suite only.
"""
