"""What is asked of a run, and what comes of it: the types that the flow takes and returns."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from se_compress.artifacts import (
    Comparison,
    CompressionPlan,
    CurvePoint,
    ExpertId,
    ExpertProfile,
    ModelSource,
    RunOptions,
    ValidationReport,
    from_json,
)
from se_compress.errors import RecipeError, SeCompressError
from se_compress.recipe import Recipe
from se_compress.recipe_file import PLAN_BYTES, read_text
from se_compress.running.places import output_of, profiled, rejected
from se_compress.running.run_directory import profile_files

Notice = Callable[[str], None]


@contextmanager
def naming(variant: str) -> Iterator[None]:
    """Errors say which variant they come from. A single result is called "" and not named."""
    try:
        yield
    except SeCompressError as error:
        if not variant:
            raise
        raise type(error)(f"variant {variant}: {error}") from None


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    recipe_text   the recipe file, verbatim
    recipe_file   where it lies, if it is a file
    plan_file     a plan to use in place of a fresh one
    fresh         ignore saved progress and an existing result
    notice        called with a sentence when something is reused, redone or given up
    siblings      outputs of the other variants, whose profile may serve this one as well
    keep_code     the result names the model's own code (auto_map), and has its files
    profiles_in   where profiles lie that were made without a result; None: beside the output
    """

    recipe: Recipe
    recipe_text: str
    options: RunOptions = RunOptions()
    plan_file: Path | None = None
    fresh: bool = False
    notice: Notice = lambda sentence: None
    siblings: tuple[Path, ...] = ()
    keep_code: bool = False
    recipe_file: Path | None = None
    profiles_in: Path | None = None

    @property
    def output(self) -> Path:
        return output_of(self.recipe.output)

    @cached_property
    def plan_text(self) -> str:
        """Text of the plan file, "" without one. Read once, for the file may be a pipe."""
        if self.plan_file is None:
            return ""
        return read_text(self.plan_file, PLAN_BYTES, "a plan", f"--plan {self.plan_file}")

    @property
    def plan(self) -> CompressionPlan | None:
        """The plan that is handed in, as it was written. None without a plan file."""
        if self.plan_file is None:
            return None
        return from_json(CompressionPlan, self.plan_text, str(self.plan_file))

    @property
    def profile_files(self) -> Iterator[Path]:
        """Files that may hold a profile that serves this run, the latest first."""
        for output in (self.output, *self.siblings):
            yield from profile_files(output)
        alone = self.profiles_in or profiled(self.output)
        yield alone / "profile.json"
        yield from sorted(alone.glob("*/profile.json"))

    def options_in(self, work: Path) -> RunOptions:
        """Options of the stages that save their progress in `work`."""
        options = replace(self.options, work=work, notice=self.notice)
        return replace(options, keep_code=self.keep_code)

    def place_of(self, report: ValidationReport) -> Path:
        """Directory of a result with that verdict."""
        return self.output if report.passed else rejected(self.output)

    def by_variant(self) -> dict[str, "Request"]:
        """A request for each variant, whose messages and progress bear its name.

        Raises RecipeError if a plan is handed in, which cannot serve them all.
        """
        if self.plan_file is not None:
            raise RecipeError(
                f"--plan {self.plan_file}: one plan cannot serve {len(self.recipe.variants)} "
                "variants; give it to a recipe without variants"
            )
        return {name: self._variant(name) for name in self.recipe.variants}

    def _variant(self, name: str) -> "Request":
        variants, options = self.recipe.variants, self.options
        others = (other.output for key, other in variants.items() if key != name)
        return replace(
            self,
            recipe=variants[name],
            options=replace(
                options, progress=lambda stage, *steps: options.progress(f"{name}: {stage}", *steps)
            ),
            notice=lambda sentence: self.notice(f"{name}: {sentence}"),
            siblings=tuple(map(output_of, others)),
            profiles_in=self.profiles_in or profiled(self.output),
        )


@dataclass(frozen=True)
class Outcome:
    """Where the checkpoint is, and what was found out on the way."""

    directory: Path
    profile: ExpertProfile
    plan: CompressionPlan
    validation: ValidationReport

    @property
    def published(self) -> bool:
        """Whether it lies under the output's name; a rejected one lies beside it."""
        return self.validation.passed


@dataclass(frozen=True)
class VariantsOutcome:
    """What became of each variant; `directory` holds the comparison."""

    directory: Path
    outcomes: Mapping[str, Outcome]
    comparison: Comparison

    @property
    def published(self) -> bool:
        """Whether every variant that has to pass did, and at least one."""
        return self.comparison.passed


@dataclass(frozen=True)
class Profiled:
    """What was measured; `directory` holds it.

    profiles    of each variant, by name; the only one is called ""
    expected    the super experts that the recipe of each expects
    """

    directory: Path
    profiles: Mapping[str, ExpertProfile]
    expected: Mapping[str, tuple[ExpertId, ...]]

    def file(self, name: str) -> Path:
        """The profile.json of a variant."""
        return self.directory / name / "profile.json"


@dataclass(frozen=True)
class Preview:
    """What a dry run can tell without reading a weight.

    profile    of an earlier run, if there is one
    curve      what other budgets would buy
    shortage   what the disk here lacks for the run; "" if nothing
    cautions   what is doubtful in the recipe
    serving    how each target serves the result, a sentence each
    finest     what the target's granularity costs beside the finest one; "" if nothing is known
    memory     what the run takes, a sentence
    """

    source: ModelSource
    plan: CompressionPlan
    profile: ExpertProfile | None
    curve: tuple[CurvePoint, ...]
    shortage: str = ""
    cautions: tuple[str, ...] = ()
    serving: tuple[str, ...] = ()
    finest: str = ""
    memory: str = ""
