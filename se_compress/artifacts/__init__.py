"""What flows between the stages, one file per JSON file. Read this folder first.

    Recipe -> ModelSource -> ExpertProfile -> CompressionPlan -> Compressed -> ValidationReport

Every artefact is frozen, and everything that is said about an expert is keyed by `ExpertId`: the
decoder's own layer index (0-based, dense layers counted) and the expert's index, or "shared". Never
by a position in some list. These modules need the standard library only.
"""

from se_compress.artifacts.checks import (
    Check,
)
from se_compress.artifacts.codec import (
    NOT_FINITE,
    Artifact,
    digest_of,
    from_json,
    to_json,
    to_json_line,
    write_atomically,
)
from se_compress.artifacts.comparison import (
    CheckpointSummary,
    ComparedVariant,
    Comparison,
    PlanSummary,
    ProfileSummary,
    RunResult,
)
from se_compress.artifacts.compression import (
    COMPRESSION_FILE,
    Compressed,
    DistillRecord,
    ExpertRecord,
    FoldRecord,
    LayerRecord,
    LinearRecord,
    RefineRecord,
    RepairRecord,
)
from se_compress.artifacts.expectation import (
    surprise,
)
from se_compress.artifacts.gates import (
    DISTANCE,
    GATES,
    Gate,
    Side,
    unlimited,
)
from se_compress.artifacts.held_out import (
    Departure,
    DomainReport,
    Tail,
    TaskReport,
    TextRecord,
)
from se_compress.artifacts.ids import (
    GONE,
    NO_BITS,
    OURS,
    PROJECTION_GROUPS,
    ROLES,
    SOURCE_BITS,
    UNLESS_NONE,
    Action,
    ExpertId,
    ExpertIndex,
    ProjectionGroup,
    Role,
)
from se_compress.artifacts.options import (
    ALONE,
    Ranks,
    RunOptions,
)
from se_compress.artifacts.plan import (
    CompressionPlan,
    CurvePoint,
    ExpertDecision,
    OtherDecision,
    Rescue,
    Scheme,
)
from se_compress.artifacts.profile import (
    Ablation,
    Choice,
    ExpertProfile,
    ExpertStats,
    LayerSimilarity,
    LayerStats,
    OutlierExpert,
    OutlierReason,
    Stability,
    SuperExpert,
    UndecidedLayer,
)
from se_compress.artifacts.source import (
    Encoding,
    ModelSource,
    Stored,
    TensorInfo,
    TensorKind,
)
from se_compress.artifacts.study import (
    StabilityStudy,
    StudiedProfile,
)
from se_compress.artifacts.validation import (
    Continuation,
    LayerComparison,
    Loop,
    MassiveElement,
    SinkPosition,
    ValidationReport,
)

__all__ = [
    "ALONE",
    "COMPRESSION_FILE",
    "DISTANCE",
    "GATES",
    "GONE",
    "NOT_FINITE",
    "NO_BITS",
    "OURS",
    "PROJECTION_GROUPS",
    "ROLES",
    "SOURCE_BITS",
    "UNLESS_NONE",
    "Ablation",
    "Action",
    "Artifact",
    "Check",
    "CheckpointSummary",
    "Choice",
    "ComparedVariant",
    "Comparison",
    "Compressed",
    "CompressionPlan",
    "Continuation",
    "CurvePoint",
    "Departure",
    "DistillRecord",
    "DomainReport",
    "Encoding",
    "ExpertDecision",
    "ExpertId",
    "ExpertIndex",
    "ExpertProfile",
    "ExpertRecord",
    "ExpertStats",
    "FoldRecord",
    "Gate",
    "LayerComparison",
    "LayerRecord",
    "LayerSimilarity",
    "LayerStats",
    "LinearRecord",
    "Loop",
    "MassiveElement",
    "ModelSource",
    "OtherDecision",
    "OutlierExpert",
    "OutlierReason",
    "PlanSummary",
    "ProfileSummary",
    "ProjectionGroup",
    "Ranks",
    "RefineRecord",
    "RepairRecord",
    "Rescue",
    "Role",
    "RunOptions",
    "RunResult",
    "Scheme",
    "Side",
    "SinkPosition",
    "Stability",
    "StabilityStudy",
    "Stored",
    "StudiedProfile",
    "SuperExpert",
    "Tail",
    "TaskReport",
    "TensorInfo",
    "TensorKind",
    "TextRecord",
    "UndecidedLayer",
    "ValidationReport",
    "digest_of",
    "from_json",
    "surprise",
    "to_json",
    "to_json_line",
    "unlimited",
    "write_atomically",
]
