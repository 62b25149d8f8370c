"""--push-to-hub: a result that passed its gates, as a repository of the Hub."""

from pathlib import Path

from se_compress.errors import RecipeError, ResourceError, shorten
from se_compress.request import Outcome
from se_compress.running.manifest import FILES_FILE, read_list


def check_hub(repository: str) -> None:
    """Before the work: it is a name, and somebody is logged in who can be asked for.

    Raises RecipeError, ResourceError if the Hub cannot be reached.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils._validators import validate_repo_id

    where = f"--push-to-hub {repository}"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise RecipeError(f"{where}: {_line(error)}") from None
    if "/" not in repository:
        raise RecipeError(f"{where}: write it as owner/name")
    if constants.is_offline_mode():
        raise RecipeError(f"{where}: HF_HUB_OFFLINE is set; unset it to upload")
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError:
        raise RecipeError(
            f"{where}: nobody is logged in; set HF_TOKEN or run hf auth login"
        ) from None
    except HfHubHTTPError as error:
        raise RecipeError(f"{where}: the Hub does not know the token ({_line(error)})") from None
    except (HTTPError, OSError) as error:
        raise ResourceError(f"{where}: the Hub cannot be reached ({_line(error)})") from None


def push(outcome: Outcome, repository: str) -> str:
    """Upload the files that the run has written, and none that somebody added; returns the address.

    A repository that is not there is made private. A rejected result is never uploaded.

    Raises ResourceError; the result stays where it is.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi, close_session
    from huggingface_hub.errors import HfHubHTTPError

    if not outcome.published:
        raise RuntimeError("a rejected result is not uploaded; this is a bug")
    close_session()  # that which read model and text has little patience (`hub.bound_waiting`)
    try:
        made = HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repository,
            folder_path=outcome.directory,
            allow_patterns=files_of(outcome.directory),
            commit_message="A checkpoint of se-compress that passed its gates",
        )
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        raise ResourceError(
            f"--push-to-hub {repository}: the upload failed ({_line(error)}); the result is in "
            f"{outcome.directory}, and the same command uploads it again"
        ) from None
    return str(made)


def files_of(directory: Path) -> list[str]:
    """Names of the files of a result, as its list has them, and the list itself."""
    listed = read_list(directory)
    if listed is None:
        raise ResourceError(f"{directory / FILES_FILE} cannot be read, so nothing is uploaded")
    return [*sorted(listed.names), FILES_FILE]


def _line(error: Exception) -> str:
    return shorten(" ".join(str(error).split()), 200)
