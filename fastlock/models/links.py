"""What leads to the tensors of relocked models, by names in dicts, and whether it still does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastlock.models.members import Member
from fastlock.models.sites import BareProjections
from fastlock.models.state import RECEIPT


class Links:
    """Where names are looked up, and what they mean: modules and their tensors, and the marks of the lock.

    Python's own comparison of lists and dicts takes what is the same object for equal, and looks no further: so all of
    this is compared in a microsecond or two. Tensors that are not the same are compared number by number, which either
    fails or says that something changed; but for tensors of one number, see `_alone`.
    """

    def __init__(self, models: Sequence[nn.Module | BareProjections], members: Sequence[Member]) -> None:
        self._dicts: list[dict[Any, Any]] = []
        self._names: list[Any] = []
        self._meanings: list[Any] = []
        self._tensors: list[dict[Any, Any]] = []
        self._alone: list[tuple[dict[Any, Any], Any, Any]] = []
        self._seen: set[tuple[int, Any]] = set()
        for model, member in zip(models, members, strict=True):
            if isinstance(model, dict):
                self._alone += [(model, site.layer, model.get(site.layer)) for site in member.sites]
            else:
                self._note_model(member)
        self._tensors_then = [dict(tensors) for tensors in self._tensors]

    def changed(self) -> bool:
        """Whether a name means something else now, where it is looked up."""
        if list(map(dict.get, self._dicts, self._names)) != self._meanings:
            return True
        try:
            if self._tensors != self._tensors_then:
                return True
        except (RuntimeError, TypeError):  # of tensors that are not the same
            return True
        for names, name, meaning in self._alone:  # noqa: SIM110 - a generator takes longer
            if names.get(name) is not meaning:
                return True
        return False

    def _note_model(self, member: Member) -> None:
        inner: Any = member.model
        self._alone.append((inner.__dict__, RECEIPT, inner.__dict__.get(RECEIPT)))
        for site in member.sites:
            module = inner
            for name in site.name.split("."):
                module = self._note(module._modules, name)
            parameters = module._parameters
            if any(tensor is not None and tensor.numel() == 1 for tensor in parameters.values()):
                self._alone += [(parameters, name, parameters.get(name)) for name in ("weight", "bias")]
            else:
                self._tensors.append(parameters)

    def _note(self, modules: dict[Any, Any], name: Any) -> Any:
        """A module of a module, by its name there."""
        module = modules.get(name)
        if (id(modules), name) not in self._seen:
            self._seen.add((id(modules), name))
            own_equality: Any = type(module).__eq__
            if own_equality is object.__eq__:
                self._dicts.append(modules)
                self._names.append(name)
                self._meanings.append(module)
            else:
                self._alone.append((modules, name, module))
        return module
