# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 the unsloth_patches authors
"""What an entry of the catalogue says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Dict, FrozenSet, Tuple


@dataclass(frozen = True)
class Target:
    """One attribute of Unsloth (or unsloth_zoo) and what replaces it.

    attribute: ``"package.module:name"``, on the leaf module that defines the name (see ``imported``).
    replacement: ``"path.below.unsloth:decorator"``, a function ``stock -> new object``; of a staticmethod or
        classmethod it takes the plain function. In the fork it stands as ``@decorator`` above the
        definition, or as ``name = decorator(name)`` after an import or assignment.
    fingerprints: accepted AST hashes of the stock function: for a replacement that does its body's work
        itself. Empty where it calls stock (then ``signature`` and ``names`` say what it counts on, and
        releases that only edit the body keep the patch), or where it checks the stock object itself (a
        table of templates has no AST).
    signature: parameters that stock has to have, ``"name"`` or ``"name=default"``: these and no others, in
        this order. A ``"*"`` stands for others that a replacement hands on; those named after it can
        stand anywhere: ``("model", "labels", "*", "n_items")``.
    names: what the replacement uses of stock's module, ``"name"``, or of another, ``"package.module:name"``.
    uses: dotted names that stock's code has to use, as ``"torch.compile"``, for a replacement that changes
        what they do while stock runs.
    wired_in: the fork's file that is edited; by default the file of ``attribute``'s module. Needed for
        names of unsloth_zoo, which a patch to Unsloth cannot edit.
    import_after: the line of that file that the decorator's import follows; by default the import that sorts
        before it; ``check`` names patches that meet there. ``"beside"``: right above the definition,
        as Unsloth does itself where a module's top has no place for it.
    optional: a supported release lacks the module or the name; the rest of the patch holds without it.
    imported: the module takes what another one defines, and only its own name for it is replaced. What is
        not marked so has moved where it is found in another module, and its patch is skipped.
    """

    attribute: str
    replacement: str
    fingerprints: FrozenSet[str] = frozenset()
    wired_in: str = ""
    optional: bool = False
    import_after: str = ""
    signature: Tuple[str, ...] = ()
    names: Tuple[str, ...] = ()
    uses: Tuple[str, ...] = ()
    imported: bool = False

    @property
    def module(self) -> str:
        return self.attribute.partition(":")[0]

    @property
    def name(self) -> str:
        return self.attribute.partition(":")[2]


@dataclass(frozen = True)
class Patch:
    """A focused change that is one pull request in the git form.

    modules: files it adds, relative to ``unsloth_patches/unsloth/`` here and to ``unsloth/`` in the fork;
        of a new package ``__init__.py`` too.
    tests: test file -> backend it needs, ``"cpu"`` (Unsloth's CPU backend) or ``"interpreter"``
        (GPU code paths, Triton kernels in the interpreter) or ``"gloo"`` (the CPU backend, in a process
        that does nothing but fork ranks: a fork after a backward pass would hang).
    shared: files of ``tests/_shared/`` that it brings for its tests and those of the patches that require it.
    requires: names of patches that have to be in before this one; they stand earlier in ``PATCHES``.
    after: names of patches that decorate the same function: in the git form it stands on them, so that
        no hunks meet; at import it does without them.
    wraps_later: functions, ``"package.module:name"``, that its replacements wrap (``functools.wraps``) once
        they run; ``undo()`` takes those wraps off.
    since: the oldest release that has what it builds on; with an older one it is skipped.
    """

    name: str
    title: str
    targets: Tuple[Target, ...]
    modules: Tuple[str, ...] = ()
    tests: Dict[str, str] = field(default_factory = dict)
    shared: Tuple[str, ...] = ()
    requires: Tuple[str, ...] = ()
    after: Tuple[str, ...] = ()
    wraps_later: Tuple[str, ...] = ()
    since: str = ""

    @property
    def dotted_modules(self) -> Tuple[str, ...]:
        """``modules`` as they are imported below ``unsloth``; a package by its folder's name."""
        paths = (file[: -len(".py")].replace("/", ".") for file in self.modules)
        return tuple(
            path[: -len(".__init__")] if path.endswith(".__init__") else path for path in paths
        )
