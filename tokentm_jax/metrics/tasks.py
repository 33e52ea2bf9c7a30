"""The table of tasks. A task of yours is a new row: `TASKS["mine"] = Task(...)`."""

from tokentm_jax.metrics.causes import DELETION, EFFECTS, POINTING
from tokentm_jax.metrics.complexity import COMPLEXITY
from tokentm_jax.metrics.eraser import ERASER, LEAVE_ONE_OUT, PEOPLE
from tokentm_jax.metrics.infidelity import INFIDELITY
from tokentm_jax.metrics.insertion import INSERTION
from tokentm_jax.metrics.perturbation import PERTURBATION, ROAD
from tokentm_jax.metrics.reasons import REASONS
from tokentm_jax.metrics.saco import SACO
from tokentm_jax.metrics.segmentation import SEGMENTATION
from tokentm_jax.metrics.sensitivity import SENSITIVITY
from tokentm_jax.metrics.similarity import SANITY, SHAPLEY
from tokentm_jax.metrics.srg import SRG
from tokentm_jax.metrics.task import Task

TASKS: dict[str, Task] = {
    "perturbation": PERTURBATION,
    "segmentation": SEGMENTATION,
    "insertion": INSERTION,
    "saco": SACO,
    "sanity": SANITY,
    "srg": SRG,
    "road": ROAD,
    "sensitivity": SENSITIVITY,
    "infidelity": INFIDELITY,
    "complexity": COMPLEXITY,
    "shapley": SHAPLEY,
    "eraser": ERASER,
    "leave_one_out": LEAVE_ONE_OUT,
    "people": PEOPLE,
    "pointing": POINTING,
    "effects": EFFECTS,
    "deletion": DELETION,
    "reasons": REASONS,
}
