"""Files of the Hugging Face Hub, by addresses hf://OWNER/NAME[@REVISION][/FILE], through `huggingface_hub`.

Its cache folder, token and offline mode (HF_HOME, HF_HUB_OFFLINE=1) hold: what is in the cache needs no network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from scalr_jax.runtime.errors import InputError

PREFIX = "hf://"
ADDRESS = re.compile(r"hf://(?P<repo>[^/@\s]+/[^/@\s]+)(@(?P<revision>[^/\s]+))?(/(?P<file>[^\s]+))?")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # as transformers and timm call them
ABOUT = ("*.json", "*.md", "*.safetensors")


def is_address(path: str | Path) -> bool:
    """Whether this names something on the hub."""
    return str(path).startswith(PREFIX)


def fetched(address: str, patterns: Sequence[str] | None = None) -> Path:
    """The local copy of a file on the hub, or the folder of a repository with the files of `patterns` (None: all).

    Raises `InputError`, one sentence: no such address, not there, not reachable, or `huggingface_hub` is missing.
    """
    match = ADDRESS.fullmatch(address)
    if match is None or ".." in address:
        raise InputError(f"{address} is no address on the hub; give hf://OWNER/NAME, with /FILE for one file of it")
    try:
        from huggingface_hub import snapshot_download  # pyright: ignore[reportMissingImports]
        from huggingface_hub.errors import HfHubHTTPError  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            f"{address} needs the package huggingface_hub: pip install 'scalr_jax[hub]'; or give the path of a file"
        ) from None
    file = match["file"]
    try:
        chosen = [file] if file else None if patterns is None else list(patterns)
        folder = Path(snapshot_download(match["repo"], revision=match["revision"], allow_patterns=chosen))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(
            f"{address} cannot be fetched ({reason}); check the name, log in where it is private (hf auth login), and "
            "with HF_HUB_OFFLINE=1 fetch it before"
        ) from None
    if file and not (folder / file).exists():
        raise InputError(f"{address} is not there: {match['repo']} {_has(folder)}; give one of its files")
    return folder / file if file else folder


def weights_file(address: str) -> Path:
    """The weights of a repository, or the file that the address names. Raises as `fetched`."""
    match = ADDRESS.fullmatch(address)
    if match is not None and match["file"]:
        return fetched(address)
    return first_weights(fetched(address, (*ABOUT, *WEIGHTS)), address)


def first_weights(folder: Path, address: str) -> Path:
    """The weights in the local copy of a repository. Raises `InputError` where they are called otherwise."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{address} has no {WEIGHTS[0]}: it {_has(folder)}; name the file, hf://OWNER/NAME/FILE")


def _has(folder: Path) -> str:
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return f"has {', '.join(files[:5])}{' and others' if len(files) > 5 else ''}" if files else "has no such file"


def check_repository(address: str) -> str:
    """The OWNER/NAME to push to. Raises `InputError` for an address of something else."""
    match = ADDRESS.fullmatch(address)
    if match is None or match["file"] or match["revision"]:
        raise InputError(f"--push={address} must be hf://OWNER/NAME")
    return match["repo"]


def push(folder: Path, address: str, message: str) -> str:
    """Uploads a folder into a repository, which is made (private) where it is not there. Returns where it is.

    Raises as `fetched`.
    """
    repository = check_repository(address)
    try:
        from huggingface_hub import HfApi  # pyright: ignore[reportMissingImports]
        from huggingface_hub.errors import HfHubHTTPError  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError("--push needs the package huggingface_hub: pip install 'scalr_jax[hub]'") from None
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=message)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(
            f"{folder} is written, and could not be pushed to {address} ({reason}); log in (hf auth login), and run "
            "the command again with --overwrite"
        ) from None
    return address
