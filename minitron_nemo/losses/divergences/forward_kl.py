"""KL(teacher, student), the papers' loss (2407.14679, tables 15 and 16): in every chunk's statistics already."""

from dataclasses import dataclass
from typing import ClassVar

from minitron_nemo.losses.output import FORWARD_KL


@dataclass(frozen=True)
class ForwardKL:
    """sum_v p_t (log p_t - log p_s); gradient p_s - p_t. A name alone: `losses/kernels` compute both."""

    name: ClassVar[str] = FORWARD_KL
    tempered: ClassVar[bool] = True
