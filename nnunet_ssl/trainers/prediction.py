"""The trainer that a checkpoint names, and whether nnU-Net will build with it the network that has been trained."""

from __future__ import annotations

import inspect
import re
from copy import deepcopy
from typing import ClassVar

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_ssl.errors import UserError


class Prediction(nnUNetTrainer):
    """What makes a checkpoint one that ``nnUNetv2_predict`` reads."""

    inference_trainer: ClassVar[str | None] = None  # what a checkpoint says it is: see trainer_of_checkpoints

    @classmethod
    def trainer_of_checkpoints(cls) -> str:
        """The trainer that a checkpoint names, whose network nnU-Net then builds to predict.

        It is the ``inference_trainer`` of a class, unless one derived from it builds another network; nnU-Net's own
        trainer, where that is whose network it is; and else the class itself, which nnU-Net has found before.
        """

        def place(name: str) -> int:
            return next(place for place, base in enumerate(cls.__mro__) if name in vars(base))

        builder = place("build_network_architecture")
        if cls.inference_trainer is not None and place("inference_trainer") <= builder:
            return cls.inference_trainer
        owner = cls.__mro__[builder]
        return (owner if owner.__module__.startswith("nnunetv2.") else cls).__name__

    def _refuse_another_network(self) -> None:
        """Build the network as nnU-Net will to predict, and see that it is the one that trains.

        Raises:
            UserError: it is not.
        """
        name = self.trainer_of_checkpoints()
        if why := self._why_not_the_network_of(name):
            raise UserError(
                f"{type(self).__name__} trains another network than {name}.build_network_architecture builds, which is "
                f"what nnUNetv2_predict would use ({why}). Build the network there: in a static method, from its "
                "arguments alone."
            )

    def _why_not_the_network_of(self, name: str) -> str | None:
        if unwrapped(self.network) is not self.plans_network:
            return "self.network was replaced after nnUNetTrainerSSL.initialize"
        named = [base for base in type(self).__mro__ if base.__name__ == name]
        try:
            with self.seeded("prediction"):
                built = self._built_by(named[0] if named else recursive_find_trainer_class_by_name(name))
        except Exception as error:  # any error would be raised in prediction too
            return f"building it fails: {error}"
        try:
            built.load_state_dict(self.plans_network.state_dict())
        except RuntimeError:
            return "the weights do not fit"
        return None if _layers(built) == _layers(self.plans_network) else "their layers differ"

    def _built_by(self, trainer: type[nnUNetTrainer]) -> nn.Module:
        """As ``nnUNetPredictor.initialize_from_trained_model_folder`` builds it."""
        build = trainer.build_network_architecture
        plans_manager = PlansManager(deepcopy(self.plans_manager.plans))
        configuration = plans_manager.get_configuration(self.configuration_name)
        described = (plans_manager, configuration)
        if "plans_manager" not in inspect.signature(build).parameters:  # as before nnU-Net 2.7
            names = ("network_arch_class_name", "network_arch_init_kwargs", "network_arch_init_kwargs_req_import")
            described = tuple(getattr(configuration, name) for name in names)
        heads = self.label_manager.num_segmentation_heads
        network = build(*described, self.num_input_channels, heads, enable_deep_supervision=False)
        return nn.SyncBatchNorm.convert_sync_batchnorm(network) if self.is_ddp else network


def unwrapped(network: nn.Module) -> nn.Module:
    """Without what DistributedDataParallel and ``torch.compile`` put around it."""
    network = network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
    return getattr(network, "_orig_mod", network)


def _layers(network: nn.Module) -> list[tuple[str, str, str]]:
    """Name, type and parameters of all modules, less what tells nothing of prediction: rates of dropout, addresses."""
    return [
        (name, kind, "" if "Drop" in kind else re.sub(r" at 0x[0-9a-f]+", "", module.extra_repr()))
        for name, module in network.named_modules()
        for kind in [type(module).__name__]
    ]
