"""Mixtures of LoRA experts with any router, as PEFT adapters.

    from peft import get_peft_model
    from routerlab.adapters import MixtureOfLoraConfig
    model = get_peft_model(base, MixtureOfLoraConfig(router="mixtral", num_experts=8, r=8))

Importing this module makes the adapter known to PEFT: ``PeftModel.from_pretrained`` finds it.
"""

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from routerlab.adapters.config import PEFT_TYPE, MixtureOfLoraConfig
from routerlab.adapters.model import MixtureOfLoraModel

__all__ = ["MixtureOfLoraConfig", "MixtureOfLoraModel"]

# A plain string, since PEFT's own enumeration of types is closed.
PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(PEFT_TYPE, MixtureOfLoraConfig)  # type: ignore[arg-type]
PEFT_TYPE_TO_TUNER_MAPPING.setdefault(PEFT_TYPE, MixtureOfLoraModel)  # type: ignore[arg-type]
PEFT_TYPE_TO_PREFIX_MAPPING.setdefault(PEFT_TYPE, MixtureOfLoraModel.prefix)  # type: ignore[arg-type]
