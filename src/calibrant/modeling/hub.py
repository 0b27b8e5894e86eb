"""Models from the Hugging Face hub: the id is resolved to a revision first, which is then downloaded."""

from pathlib import Path

from calibrant.errors import CalibrantError, first_line

_PREFIX = "hub:"
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "LICENSE*"]


def model_path(name: str | Path) -> Path:
    """Local folder of a model: ``name``, or for ``hub:owner/name`` the cached snapshot of its current revision.

    Raises:
        CalibrantError: the hub cannot be reached or has no such model.
    """
    if not str(name).startswith(_PREFIX):
        return Path(name)
    import huggingface_hub

    repository = str(name).removeprefix(_PREFIX)
    try:
        revision = huggingface_hub.HfApi().model_info(repository).sha
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=_WANTED))
    except Exception as error:  # the hub client raises many unrelated classes for unreachable hubs and missing models
        raise CalibrantError(f"{name}: cannot be fetched from the hub ({first_line(error)})") from error
