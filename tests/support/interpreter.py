"""Triton's interpreter without most of its time, which it spends beside the numbers.

At every call of a device function it replaces all of ``triton.language`` anew, for every value it makes
types and shapes, and of each sum of integers a check that it drops. Here the replacements are made once
a launch, types and shapes are kept, and the check is left out. What computes values is Triton's own.
"""

import math
from types import SimpleNamespace

CHANGES = []  # (owner, name, what Triton has there)
INSIDES = "_LangPatchScope", "_patch_lang", "_patch_attr", "_get_np_dtype"  # of Triton 3.6 and 3.7


def quicken():
    """Make the changes, once in a process; none to a Triton with other insides."""
    from triton.runtime import interpreter

    if not CHANGES and all(hasattr(interpreter, name) for name in INSIDES):
        names_once_a_launch(interpreter)
        kept_types(interpreter)
        no_check_without_debug()


def replace(owner, name, new):
    CHANGES.append((owner, name, getattr(owner, name)))
    setattr(owner, name, new)


def names_once_a_launch(interpreter):
    """Replace the names of ``triton.language`` at a launch, the same in each, and in no call."""
    from triton import language

    own_patch, own_call = interpreter._patch_lang, interpreter.InterpretedFunction.__call__
    semantic = interpreter.interpreter_semantic
    names, launched = [], []

    class Scope(interpreter._LangPatchScope):
        def restore(self):
            super().restore()
            launched.clear()

    def patch(fn):
        if not names:
            modules = SimpleNamespace(__globals__={"tl": language, "core": language.core})
            scope = own_patch(modules)
            names.extend((owner, name, getattr(owner, name)) for owner, name, _ in scope._changes)
            scope.restore()
        scope = Scope()
        for change in names:
            scope.set_attr(*change)
        launched.append(fn)
        return scope

    def patch_attr(owner, name, member, builder, scope):
        function = getattr(member, "__wrapped__", member)

        def call(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(owner, name, call)

    def call(self, *args, **kwargs):
        if not launched:
            return own_call(self, *args, **kwargs)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as e:
            raise interpreter.InterpreterError(repr(e)) from e

    replace(interpreter, "_patch_lang", patch)
    replace(interpreter, "_patch_attr", patch_attr)
    replace(interpreter.InterpretedFunction, "__call__", call)


def kept_types(interpreter):
    """One numpy dtype for each name of a type, one block type for each shape and dtype; nothing is done
    about operands whose shapes are the same."""
    from triton.language.core import block_type, constexpr, dtype, tensor
    from triton.language.core import tuple as language_tuple
    from triton.language.semantic import TritonSemantic

    own_numpy, own_equal = interpreter._get_np_dtype, dtype.__eq__
    own_block, own_element = block_type.__init__, block_type.with_element_ty
    own_broadcast = TritonSemantic.broadcast_impl_value
    dtypes, blocks = {}, {}
    scalar = constexpr(1), language_tuple([])

    def numpy_dtype(of):
        if of.name not in dtypes:
            dtypes[of.name] = own_numpy(of)
        return dtypes[of.name]

    def block_init(self, element_ty, shape):
        sizes = tuple(x.value if isinstance(x, constexpr) else x for x in shape)
        known = blocks.get((id(element_ty), sizes))
        if known is None:
            own_block(self, element_ty, shape)
            sizes_of_tensor = language_tuple([constexpr(x) for x in self.shape])
            self.of_tensor = constexpr(math.prod(sizes)), sizes_of_tensor
            known = blocks[id(element_ty), sizes] = dict(self.__dict__)
        self.__dict__.update(known)

    def with_element(self, element_ty):
        return self if element_ty is self.element_ty else own_element(self, element_ty)

    def tensor_init(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.of_tensor if type.is_block() else scalar

    def broadcast(self, a, b):
        shapes = [x.type.shape.values if x.type.is_block() else None for x in (a, b)]
        return (a, b) if shapes[0] == shapes[1] else own_broadcast(self, a, b)

    def same(self, other):
        return self is other or own_equal(self, other)

    replace(interpreter, "_get_np_dtype", numpy_dtype)
    replace(dtype, "__eq__", same)
    replace(block_type, "__init__", block_init)
    replace(block_type, "with_element_ty", with_element)
    replace(tensor, "__init__", tensor_init)
    replace(TritonSemantic, "broadcast_impl_value", broadcast)


def no_check_without_debug():
    """Triton computes whether an integer operation overflows and drops the answer unless in debug."""
    from triton.language.semantic import TritonSemantic

    own = TritonSemantic.binary_op_sanitize_overflow_impl

    def check(self, *operation):
        if self.builder.options.debug:
            own(self, *operation)

    replace(TritonSemantic, "binary_op_sanitize_overflow_impl", check)
