"""Where a result may go: links, mounts, names and what lies where it would be replaced."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from se_compress.errors import RecipeError
from se_compress.running.places import (
    check_apart,
    check_directory,
    expand,
    output_of,
    partial,
    rejected,
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a home beside it."""
    for name in ("here", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "here"


def test_a_tilde_is_what_the_shell_makes_of_it(tmp_path: Path) -> None:
    assert expand("~/m") == str(tmp_path / "home" / "m")
    assert output_of("~/out") == tmp_path / "home" / "out"
    for literal in ("a/~/b", "a~", "~nobodyatall/m", "owner/name", "20261127", "run #2"):
        assert expand(literal) == literal


@pytest.mark.parametrize("target", ["there", "nowhere", "deep/down"])
def test_behind_a_link_lies_the_result_and_what_is_beside_it(here: Path, target: str) -> None:
    (here / "there").mkdir()
    (here / "link").symlink_to(target)
    (here / "link2").symlink_to("link")
    for link in ("link", "link2"):
        output = output_of(link)
        assert output == here / target
        assert partial(output) == here / f"{target}.partial"
        check_directory(output)


def test_names_stay_as_they_are_given(here: Path) -> None:
    (here / "a").mkdir()
    assert output_of("out/") == Path("out")
    assert output_of("a/../out") == Path("a/../out")
    assert output_of("a/..") == here
    assert output_of(".") == here


@pytest.mark.parametrize("text", ["/", "..", "", ".", "a/..", "\0", "x" * 5000, "loop"])
def test_no_place_for_a_result(here: Path, text: str) -> None:
    (here / "a").mkdir()
    (here / "loop").symlink_to("loop")
    with pytest.raises(RecipeError, match=r"^output ") as caught:
        check_directory(output_of(text))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["x" * 256, "é" * 130, "deep/" + "x" * 256 + "/out"])
def test_names_that_are_too_long(name: str) -> None:
    with pytest.raises(RecipeError, match=r"^output ") as caught:
        check_directory(rejected(output_of(name)))
    assert len(str(caught.value)) < 400


def test_the_suffix_counts() -> None:
    check_directory(output_of("x" * 246))
    with pytest.raises(RecipeError, match="is longer than the 255 bytes of a name"):
        check_directory(rejected(output_of("x" * 247)))


def test_something_in_the_way(here: Path) -> None:
    (here / "file").touch()
    (here / "out.partial").symlink_to("elsewhere")
    (here / "elsewhere").mkdir()
    os.mkfifo(here / "pipe")
    for name, reason in {
        "file": "exists and is not a directory",
        "pipe": "exists and is not a directory",
        "file/out": "file is not a directory",
        "file/deep/out": "file is not a directory",
        "out.partial": "is a link",
    }.items():
        with pytest.raises(RecipeError, match=f"^output {name}.*{reason}"):
            check_directory(Path(name))


MOUNTED = """
mount -t tmpfs none mounted && mkdir bound still real &&
mount -t tmpfs -o ro none still && mount --bind real bound &&
exec "$0" -c '
import sys
from pathlib import Path
from se_compress.running.places import check_directory
from se_compress.errors import RecipeError
for name in sys.argv[1:]:
    try: check_directory(Path(name))
    except RecipeError as error: print(error)
' mounted bound real mounted/out still/out still/deep/out
"""


def test_mount_points_directories_bound_from_the_same_disk_and_read_only_ones(here: Path) -> None:
    (here / "mounted").mkdir()
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    done = subprocess.run(
        [*alone, "bash", "-c", MOUNTED, sys.executable], capture_output=True, text=True, check=False
    )
    if done.returncode and not done.stdout:
        pytest.skip("this machine does not let a user mount a tmpfs")
    said = done.stdout.replace(f"{here}/", "").splitlines()
    assert [line.split(",")[0] for line in said] == [
        "output mounted: is a mount point",
        "output bound: is a mount point",
        "output still: cannot be written",
        "output still: cannot be written",
    ], done.stderr


# --------------------------------------------------------------------------------- what is read


def apart(output: str, model: str = "m", **files: str) -> None:
    shards = [str(file) for file in Path(model).glob("*.safetensors")]
    named = {word: Path(file) for word, file in files.items()}
    place = output_of(output)
    check_apart((place, partial(place), rejected(place)), Path(model), shards, named)


@pytest.fixture
def model(here: Path) -> Path:
    (here / "m").mkdir()
    (here / "m" / "model.safetensors").touch()
    (here / "same").symlink_to("m")
    return here / "m"


@pytest.mark.parametrize("output", ["m", "m/out", "m/a/b", "same", "same/out", "../here/m/out"])
def test_an_output_is_not_in_the_model(model: Path, output: str) -> None:
    for name in ("m", "same", str(model)):
        with pytest.raises(RecipeError, match="is, holds or lies in the model"):
            apart(output, name)


@pytest.mark.parametrize("name", ["out", "out.partial", "out.rejected", "out/deep/er"])
def test_a_model_is_not_in_what_is_replaced(here: Path, name: str) -> None:
    (here / name).mkdir(parents=True)
    with pytest.raises(RecipeError, match="is, holds or lies in the model"):
        apart("out", name)
    (here / "link").symlink_to("out")
    with pytest.raises(RecipeError, match="is, holds or lies in the model"):
        apart("link", name)


def test_weights_behind_links_are_the_model_s_as_well(here: Path) -> None:
    for name in ("m", "out/checkpoint"):
        (here / name).mkdir(parents=True)
    (here / "out" / "checkpoint" / "blob").touch()
    (here / "m" / "model.safetensors").symlink_to("../out/checkpoint/blob")
    with pytest.raises(RecipeError, match="is, holds or lies in the model"):
        apart("out")
    apart("elsewhere")


def test_what_is_beside_the_model_is_free(model: Path, here: Path) -> None:
    for output in ("out", "m2", "m.out", "deep/m"):
        apart(output)
    (here / "out").mkdir()
    apart("out")


@pytest.mark.parametrize("place", ["out", "out.partial", "out.rejected"])
def test_no_file_that_is_read_lies_where_it_is_replaced(
    model: Path, here: Path, place: str
) -> None:
    (here / place / "deep").mkdir(parents=True)
    (here / place / "deep" / "file").touch()
    (here / "file").symlink_to(f"{place}/deep/file")
    for file in (f"{place}/deep/file", "file", str(here / place / "deep" / "file")):
        with pytest.raises(RecipeError, match=rf"^output {place}: holds the plan {file}"):
            apart("out", **{"the plan": file})
    apart("other", **{"the plan": "file"})
    apart("out", **{"the data": f"{place}/name-on-the-hub"})
