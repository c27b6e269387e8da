"""What an output folder may hold, by name, in full.

Everything else stays behind, above all code (*.py), pickles (*.bin), secrets (.env), history (.git) and training state.
"""

import re

# The folder of the buffers that belong to no checkpoint.
BUFFERS = "mono_quant_buffers"

_WEIGHTS = r"(diffusion_pytorch_)?model(-\d{5}-of-\d{5})?\.safetensors|(diffusion_pytorch_)?model\.safetensors\.index\.json"
_BUFFERS = rf"{BUFFERS}/model\.safetensors"

ALLOWED = (
    # the model's description
    r"config\.json|generation_config\.json",
    # our weights and their index, as transformers and diffusers call them; a pickle can run code when it is read
    _WEIGHTS,
    # our manifest and report, the card
    r"mono_quant\.json|mono_quant_report\.json|README\.md",
    # tokenizer: the fast one, the settings, and the vocabularies of the slow ones
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|normalizer\.json",
    r"vocab\.(txt|json)|merges\.txt|[A-Za-z0-9][A-Za-z0-9_.-]*\.(model|tiktoken)",
    # processors of images, sound and video; templates are text that is rendered in a sandbox
    r"(preprocessor|processor|video_preprocessor|image_processor|feature_extractor)_config\.json",
    r"chat_template\.(jinja|json)|additional_chat_templates/[A-Za-z0-9][A-Za-z0-9_.-]*\.jinja",
    # sentence-transformers: the list of modules and each module's settings and dense weights
    r"modules\.json|config_sentence_transformers\.json|sentence_[a-z0-9]+_config\.json",
    r"\d+_[A-Za-z][A-Za-z0-9_]*/([A-Za-z0-9_]*config\.json|model\.safetensors)",
    r"\d+_(Router|Asym)/([A-Za-z0-9_]+_)?\d+_[A-Za-z][A-Za-z0-9_]*/([A-Za-z0-9_]*config\.json|model\.safetensors)",
    # out of the way of loaders that take every file beside the weights
    _BUFFERS,
    # terms that must travel along
    LICENCE := r"(?i:LICEN[SC]E|NOTICE|USE_POLICY)[A-Za-z0-9_-]*(\.(txt|md|rst|pdf))?",
)
_ALLOWED = re.compile("|".join(f"(?:{pattern})" for pattern in ALLOWED))

# Found beside the files of every clone or download from the Hub.
HUB_EXTRAS = (".gitattributes", ".cache/", ".git/")


def is_allowed(name: str) -> bool:
    """Tell whether an output folder may hold a file of this name (relative, with `/`)."""
    return len(name) <= 255 and _ALLOWED.fullmatch(name) is not None


def is_weight_file(name: str) -> bool:
    """Tell whether a loader would read the model's weights, or its buffers, from a file of this name."""
    return re.fullmatch(f"{_WEIGHTS}|{_BUFFERS}", name) is not None


def is_licence(name: str) -> bool:
    """Tell whether a file holds terms that must travel along."""
    return re.fullmatch(LICENCE, name) is not None
