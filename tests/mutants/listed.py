"""Every fault of the lists beside this file."""

from mutants import of_artefacts, of_checkpoints, of_config, of_data, of_launch, of_losses, of_pruning, of_training
from mutants.fault import Fault

FAULTS: list[Fault] = [
    fault
    for room in (of_losses, of_training, of_data, of_pruning, of_checkpoints, of_artefacts, of_config, of_launch)
    for fault in room.FAULTS
]
