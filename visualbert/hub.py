"""The one way to the Hub: files of a repository, in its own cache, or one sentence."""

from collections.abc import Sequence
from pathlib import Path

from visualbert.errors import HubError


def fetch(name: str, revision: str | None, patterns: Sequence[str], instead: str) -> Path:
    """The local copy of a repository with those of its files that match.

    Args:
        name: owner/name.
        revision: branch, tag or commit.
        patterns: of the files' names.
        instead: what may be passed in place of the Hub id.

    Raises:
        ValueError: `name` is no Hub id.
        HubError: it cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except HFValidationError:
        raise ValueError(name) from None
    except Exception as error:  # the client raises what a proxy's answer makes it trip over
        at = f" at revision {revision}" if revision else ""
        raise HubError(
            f"{name}: no such {instead} here, and the Hub did not give it{at} ({_reason(error)}); "
            f"check the name and the connection, or pass a local {instead}"
        ) from error


def _reason(error: Exception) -> str:
    from huggingface_hub import errors

    known = (
        (errors.GatedRepoError, "access to this repository has to be asked for there"),
        (errors.RepositoryNotFoundError, "no such repository, or it is private: hf auth login"),
        (errors.RevisionNotFoundError, "the repository has no such revision"),
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
        (errors.LocalEntryNotFoundError, "it cannot be reached, and nothing is in the cache"),
    )
    reason = next((words for kind, words in known if isinstance(error, kind)), None)
    return reason or (str(error).strip() or type(error).__name__).splitlines()[0].strip()
