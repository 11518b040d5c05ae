"""Mistakes in the sources, each with the test that must notice it; ``mutants.py`` makes them.

Old texts are short, so that they outlive changes around them, and occur once in their file.
"""

from tests.support.mutations_autograd import (
    GPU_HOST_CODE_AND_AUTOGRAD,
    INPLACE_GRADIENT,
    PARAMETERS_AND_DECLARED,
)
from tests.support.mutations_chosen import CHOSEN_ROWS
from tests.support.mutations_host import CHECKS, CPU_PATH
from tests.support.mutations_kernels import KERNEL_MUTATIONS
from tests.support.mutations_linear import LINEAR_FORM
from tests.support.mutations_minillm import MINILLM
from tests.support.mutations_on_policy import ON_POLICY
from tests.support.mutations_operators import OPERATOR_MUTATIONS
from tests.support.mutations_outputs import TOKEN_OUTPUTS
from tests.support.mutations_phases import PHASES
from tests.support.mutations_row_statistics import ROW_STATISTICS
from tests.support.mutations_split_tokens import SPLIT_TOKENS
from tests.support.mutations_statistics import STATISTICS
from tests.support.mutations_support import SUPPORT_MUTATIONS
from tests.support.mutations_system2 import SYSTEM2
from tests.support.mutations_tails import TAILS_MUTATIONS
from tests.support.mutations_teacher import TEACHER_STORES
from tests.support.mutations_tokenizers import TOKENIZERS
from tests.support.mutations_tokens import TOKENS_AND_MOMENTS
from tests.support.mutations_topk import TOPK_MUTATIONS
from tests.support.mutations_vocab_parallel import VOCAB_PARALLEL

MUTATIONS = [
    *GPU_HOST_CODE_AND_AUTOGRAD,
    *INPLACE_GRADIENT,
    *PARAMETERS_AND_DECLARED,
    *OPERATOR_MUTATIONS,
    *CPU_PATH,
    *CHECKS,
    *KERNEL_MUTATIONS,
    *TOKENS_AND_MOMENTS,
    *LINEAR_FORM,
    *TOPK_MUTATIONS,
    *TAILS_MUTATIONS,
    *CHOSEN_ROWS,
    *SUPPORT_MUTATIONS,
    *ROW_STATISTICS,
    *PHASES,
    *TOKEN_OUTPUTS,
    *STATISTICS,
    *ON_POLICY,
    *MINILLM,
    *SYSTEM2,
    *TEACHER_STORES,
    *TOKENIZERS,
    *SPLIT_TOKENS,
    *VOCAB_PARALLEL,
]
