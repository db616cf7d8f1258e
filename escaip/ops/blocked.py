"""Attention with written-out first and second derivatives, in blocks that fit a cache: plain PyTorch, any device.

Neighborhoods of like size share a block, padded to the longest among them; a neighborhood too large for a block is cut
into runs of queries, so that memory stays linear in the tokens however long it is. Nothing but the output and the
softmax normaliser is kept for the derivatives: logits are computed again from q and k. Symbols and derivation as in
docs/concepts/attention.md: a dot is the tangent along the cotangents ``tq, tk, tv, tb, tn`` of the first derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from escaip.ops.inputs import AttentionInputs, AttentionOutputs, Gradients, accumulation_dtype
from escaip.ops.reference import legendre_polynomials

# Elements of one (queries × keys × heads) matrix; about a dozen of them are alive at a time.
BLOCK_ELEMENTS = 1 << 16
# Fewer query rows at a time would read all keys of a long neighborhood too often.
MIN_ROWS = 64


@dataclass(frozen=True)
class _Rows:
    """Rows of ``G`` neighborhoods, ``M`` each: queries or keys of a block.

    Attributes:
        index: ``(G, M)``, padded by repeating a row of the same neighborhood; or one run of rows, ``G = 1``.
        exists: ``(G, M)`` bool, or None where nothing is padded.
    """

    index: Tensor | slice
    exists: Tensor | None = None

    def take(self, x: Tensor, padding: float | None = None) -> Tensor:
        """``(T, h, ...)`` to ``(G, h, M, ...)`` in the accumulation dtype; ``padding`` goes where no row exists."""
        if isinstance(self.index, slice):
            return x[self.index].transpose(0, 1).unsqueeze(0).to(accumulation_dtype(x))
        heads = x.shape[1]
        per_head = self.index.unsqueeze(1) * heads + torch.arange(heads, device=x.device).unsqueeze(-1)  # (G, h, M)
        found = x.reshape(-1, *x.shape[2:]).index_select(0, per_head.flatten()).unflatten(0, per_head.shape)
        if self.exists is not None and padding is not None:
            mask = ~self.exists.unsqueeze(1)
            found = found.masked_fill(mask if found.ndim == 3 else mask.unsqueeze(-1), padding)
        return found.to(accumulation_dtype(x))

    def put(self, total: Tensor, x: Tensor) -> None:
        """Writes ``(G, h, M, ...)`` to rows of ``total (T, h, ...)``."""
        self._combine(total, x, torch.Tensor.copy_, torch.Tensor.index_copy_)

    def add(self, total: Tensor, x: Tensor) -> None:
        """Adds ``(G, h, M, ...)`` to rows of ``total (T, h, ...)``."""
        self._combine(total, x, torch.Tensor.add_, torch.Tensor.index_add_)

    def _combine(self, total: Tensor, x: Tensor, whole: Callable[..., Tensor], indexed: Callable[..., Tensor]) -> None:
        x = x.transpose(1, 2).to(total.dtype)
        if isinstance(self.index, slice):
            whole(total[self.index], x[0])
        elif self.exists is None:
            indexed(total, 0, self.index.flatten(), x.flatten(0, 1))
        else:
            indexed(total, 0, self.index[self.exists], x[self.exists])


@dataclass(frozen=True)
class _Block:
    """Some neighborhoods, or a run of queries of one: ``G`` neighborhoods, ``R`` query rows and ``C`` keys each."""

    query: _Rows
    key: _Rows


def forward(inputs: AttentionInputs) -> AttentionOutputs:
    """See ``escaip.ops.inputs.KernelBackend``."""
    q = inputs.q
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=accumulation_dtype(q))
    for block in _blocks(inputs):
        logits = _Logits(block, inputs)
        normaliser = torch.logsumexp(logits.value, -1)  # (G, h, R)
        probability = logits.value.sub_(normaliser.unsqueeze(-1)).exp_()
        values = logits.values
        block.query.put(out, values.matrices([(probability, values.polynomial)])[0](block.key.take(inputs.v)))
        block.query.put(lse, normaliser)
    return AttentionOutputs(out, lse)


def backward(inputs: AttentionInputs, outputs: AttentionOutputs, grad_out: Tensor, with_direction: bool) -> Gradients:
    """See ``escaip.ops.inputs.KernelBackend``."""
    sums = _Sums(inputs, with_direction)
    for block in _blocks(inputs):
        logits = _Logits(block, inputs)
        keys, values = logits.keys, logits.values
        p = (logits.value - block.query.take(outputs.lse).unsqueeze(-1)).exp_()
        g = block.query.take(grad_out, 0.0)
        d = (g * block.query.take(outputs.out)).sum(-1, keepdim=True)  # (G, h, R, 1)
        products = values.products(g, block.key.take(inputs.v))  # B^l
        r = (_weighted_sum(products, values.polynomial) - d).mul_(p)  # dS
        block.key.add(sums.v, values.matrices([(p, values.polynomial)])[1](g))
        row, column = keys.matrices([(r, keys.polynomial)])
        block.query.put(sums.q, row(logits.k))
        block.key.add(sums.k, column(logits.q))
        if sums.log_envelope is not None:
            block.key.add(sums.log_envelope, r.sum(-2))
        if sums.direction is not None:
            c = keys.cosine_gradient([(r, keys.slope, logits.products)])
            c += values.cosine_gradient([(p, values.slope, products)])
            logits.add_direction_gradient(sums.direction, c)
    return sums.finish()


def double_backward(
    inputs: AttentionInputs, outputs: AttentionOutputs, grad_out: Tensor, tangents: Gradients
) -> tuple[Tensor, Gradients]:
    """The tangent of ``backward``; see ``escaip.ops.inputs.KernelBackend``."""
    g_out, sums = torch.empty_like(inputs.q), _Sums(inputs, True)
    for block in _blocks(inputs):
        logits = _Logits(block, inputs)
        keys, values = logits.keys, logits.values
        tangent = _Tangent(logits, tangents)
        v, tv = block.key.take(inputs.v), block.key.take(tangents.v)
        p = (logits.value - block.query.take(outputs.lse).unsqueeze(-1)).exp_()
        g, attended = block.query.take(grad_out, 0.0), block.query.take(outputs.out)
        mu = (p * tangent.value).sum(-1, keepdim=True)
        dot_p = p * (tangent.value - mu)
        to_row, to_column = values.matrices(tangent.along(values, dot_p, p))
        dot_out = to_row(v) + values.matrices([(p, values.polynomial)])[0](tv)
        products, dot_products = values.products(g, v), values.products(g, tv)  # B^l and its tangent
        centred = _weighted_sum(products, values.polynomial) - (g * attended).sum(-1, keepdim=True)  # E − D
        dot_e = _weighted_sum(dot_products, values.polynomial) - (g * dot_out).sum(-1, keepdim=True)
        if tangent.cosine is not None and values.has_angles:
            dot_e = dot_e + tangent.cosine * _weighted_sum(products[1:], values.slope[1:])
        r, dot_r = p * centred, dot_p * centred + p * dot_e
        block.query.put(g_out, dot_out)
        block.key.add(sums.v, to_column(g))
        if sums.log_envelope is not None:
            block.key.add(sums.log_envelope, dot_r.sum(-2))
        row, column = keys.matrices(tangent.along(keys, dot_r, r))
        row_tangent, column_tangent = keys.matrices([(r, keys.polynomial)])
        block.query.put(sums.q, row(logits.k) + row_tangent(tangent.k))
        block.key.add(sums.k, column(logits.q) + column_tangent(tangent.q))
        if sums.direction is not None:
            c, dot_c = tangent.cosine_gradients(keys, r, dot_r, logits.products, tangent.products)
            of_values, dot_of_values = tangent.cosine_gradients(values, p, dot_p, products, dot_products)
            logits.add_direction_gradient(sums.direction, dot_c + dot_of_values)
            if tangent.direction is not None:
                logits.add_direction_gradient(sums.direction, c + of_values, tangent.direction)
    return g_out, sums.finish()


class _Sums:
    """Accumulators of the gradients, in the accumulation dtype but for q, whose rows are written once."""

    def __init__(self, inputs: AttentionInputs, with_direction: bool) -> None:
        k, dtype = inputs.k, accumulation_dtype(inputs.k)
        self.dtype = k.dtype
        self.q = torch.zeros_like(inputs.q)
        self.k, self.v = k.new_zeros(k.shape, dtype=dtype), k.new_zeros(k.shape, dtype=dtype)
        self.log_envelope = None if inputs.log_envelope is None else k.new_zeros(k.shape[:2], dtype=dtype)  # (T, h)
        self.direction: Tensor | None = None
        if with_direction and inputs.direction is not None:
            self.direction = k.new_zeros((k.shape[0], 1, 3), dtype=dtype)

    def finish(self) -> Gradients:
        """In the dtypes of the inputs, heads summed."""
        db = None if self.log_envelope is None else self.log_envelope.sum(1)
        dn = None if self.direction is None else self.direction.squeeze(1)
        return Gradients(self.q, self.k.to(self.dtype), self.v.to(self.dtype), db, dn)


_Weights = list[Tensor | None]  # by degree, ``(G, 1, R, C)``; None for one
_Products = list[Tensor | None]  # by degree, ``(G, h, R, C)``; None for a degree without channels


@dataclass(frozen=True)
class _Groups:
    """Channels by degree and their weights in a block: of queries and keys, or of the values.

    Attributes:
        widths: channels of each degree.
        factor: on the products of queries and keys.
        polynomial: ``P_l``, times ``a`` for keys; one where ``a`` is zero for values.
        slope: ``a P_l'``.
        curvature: ``a P_l''``.
    """

    widths: tuple[int, ...]
    factor: float
    polynomial: _Weights
    slope: _Weights
    curvature: _Weights

    @property
    def has_angles(self) -> bool:
        return len(self.widths) > 1

    def products(self, x: Tensor, y: Tensor) -> _Products:
        """``x^l · y^l`` of rows and columns."""
        used = sum(self.widths)
        groups = zip(x[..., :used].split(self.widths, -1), y[..., :used].split(self.widths, -1), strict=True)
        return [a @ b.mT if a.shape[-1] else None for a, b in groups]

    def matrices(self, terms: list[tuple[Tensor, _Weights]]) -> tuple[_Product, _Product]:
        """Per degree ``M_l = s Σ_terms x w_l``; applies ``M_l`` to keys (row sums) or its transpose to queries."""
        matrices: list[Tensor | None] = []
        for degree, width in enumerate(self.widths):
            total = None
            for x, weights in terms if width else ():
                weight = weights[degree]
                if degree == 0 and weights is not self.polynomial:
                    continue  # derivatives of P_0 vanish
                product = x if weight is None else x * weight
                total = product if total is None else total + product
            matrices.append(total)
        common = (matrices, self.widths, self.factor)
        return _Product(*common, False), _Product(*common, True)

    def cosine_gradient(self, terms: list[tuple[Tensor, _Weights, _Products]]) -> Tensor:
        """``s Σ_heads Σ_l Σ_terms x w_l A^l``, ``(G, 1, R, C)``; zero without angles."""
        if not self.has_angles:
            return torch.zeros((), dtype=terms[0][0].dtype, device=terms[0][0].device)
        total = None
        for x, weights, products in terms:
            product = (x * _weighted_sum(products[1:], weights[1:])).sum(1, keepdim=True)
            total = product if total is None else total + product
        assert total is not None
        return total.mul_(self.factor)


class _Logits:
    """Logits ``S`` of a block ``(G, h, R, C)``, and the pieces that their derivatives need."""

    def __init__(self, block: _Block, inputs: AttentionInputs) -> None:
        direction, log_envelope = inputs.direction, inputs.log_envelope
        self.block = block
        self.q, self.k = block.query.take(inputs.q), block.key.take(inputs.k)
        self.direction: tuple[Tensor, Tensor] | None = None  # of queries (G, 1, R, 3) and keys (G, 1, C, 3)
        weights: tuple[_Weights, _Weights, _Weights] = [None], [None], [None]
        for_values = _Groups((inputs.v.shape[-1],), 1.0, [None], [None], [None])
        if direction is not None:
            rows, columns = block.query.take(direction.unsqueeze(1)), block.key.take(direction.unsqueeze(1))
            self.direction = rows, columns
            both = (rows != 0).any(-1).unsqueeze(-1) & (columns != 0).any(-1).unsqueeze(-2)
            for derivatives in legendre_derivatives(rows @ columns.mT, len(inputs.widths) - 1)[1:]:
                for of_degree, value in zip(weights, derivatives, strict=True):
                    of_degree.append(value * both)
            if inputs.angular_values:
                polynomial = [None if x is None else x + ~both for x in weights[0]]
                for_values = _Groups(inputs.widths, 1.0, polynomial, *weights[1:])
        self.keys, self.values = _Groups(inputs.widths, inputs.scale, *weights), for_values
        self.products = self.keys.products(self.q, self.k)  # A^l
        self.value = _weighted_sum(self.products, self.keys.polynomial).mul_(inputs.scale)
        if log_envelope is not None:
            self.value = self.value + block.key.take(log_envelope.unsqueeze(1), -torch.inf).unsqueeze(-2)
        elif block.key.exists is not None:
            self.value = self.value.masked_fill(~block.key.exists[:, None, None, :], -torch.inf)

    def add_direction_gradient(self, total: Tensor, c: Tensor, direction: tuple[Tensor, Tensor] | None = None) -> None:
        """Adds ``Σ_k c_jk n_k`` to the queries and ``Σ_j c_jk n_j`` to the keys, with ``c (G, 1, R, C)``."""
        direction = direction if direction is not None else self.direction
        assert direction is not None
        rows, columns = direction
        query, key = self.block.query, self.block.key
        if query.exists is not None:
            c = c * query.exists[:, None, :, None]
        if key.exists is not None:
            c = c * key.exists[:, None, None, :]
        key.add(total, c.mT @ rows)
        query.add(total, c @ columns)  # queries are the tokens wherever there are directions


class _Tangent:
    """Tangents of the logits and of what they are made of, along ``tq, tk, tb, tn``."""

    def __init__(self, logits: _Logits, tangents: Gradients) -> None:
        block, keys, tb, tn = logits.block, logits.keys, tangents.log_envelope, tangents.direction
        self.q, self.k = block.query.take(tangents.q), block.key.take(tangents.k)
        first, second = keys.products(self.q, logits.k), keys.products(logits.q, self.k)
        self.products = [a if a is None or b is None else a + b for a, b in zip(first, second, strict=True)]
        self.value = _weighted_sum(self.products, keys.polynomial)
        self.direction: tuple[Tensor, Tensor] | None = None
        self.cosine: Tensor | None = None
        if tn is not None and logits.direction is not None:
            rows, columns = block.query.take(tn.unsqueeze(1)), block.key.take(tn.unsqueeze(1))
            self.direction = rows, columns
            self.cosine = rows @ logits.direction[1].mT + logits.direction[0] @ columns.mT
            self.value = self.value + self.cosine * _weighted_sum(logits.products[1:], keys.slope[1:])
        self.value = self.value * keys.factor
        if tb is not None:
            self.value = self.value + block.key.take(tb.unsqueeze(1)).unsqueeze(-2)

    def along(self, groups: _Groups, dot_x: Tensor, x: Tensor) -> list[tuple[Tensor, _Weights]]:
        """The terms of the tangent of ``x P_l``."""
        terms = [(dot_x, groups.polynomial)]
        if self.cosine is not None and groups.has_angles:
            terms.append((x * self.cosine, groups.slope))
        return terms

    def cosine_gradients(
        self, groups: _Groups, x: Tensor, dot_x: Tensor, products: _Products, dot_products: _Products
    ) -> tuple[Tensor, Tensor]:
        """The gradient of the cosines for weights ``x`` of the products, and its tangent."""
        terms = [(dot_x, groups.slope, products), (x, groups.slope, dot_products)]
        if self.cosine is not None:
            terms.append((x * self.cosine, groups.curvature, products))
        return groups.cosine_gradient([(x, groups.slope, products)]), groups.cosine_gradient(terms)


@dataclass(frozen=True)
class _Product:
    """Applies one matrix per degree to the channels of that degree."""

    matrices: list[Tensor | None]
    widths: tuple[int, ...]
    scale: float
    transposed: bool

    def __call__(self, x: Tensor) -> Tensor:
        """``(G, h, C or R, d)`` to ``(G, h, R or C, d)``; zero in channels that take no part in the logits."""
        parts = []
        for matrix, part in zip(self.matrices, x[..., : sum(self.widths)].split(self.widths, -1), strict=True):
            if matrix is not None:
                parts.append((matrix.mT if self.transposed else matrix) @ part)
        rest = x.shape[-1] - sum(self.widths)
        joined = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        return torch.nn.functional.pad(joined.mul_(self.scale), (0, rest))


def _weighted_sum(groups: _Products, weights: _Weights) -> Tensor:
    """``Σ_l w_l A^l``; a weight of None is one."""
    total = None
    for group, weight in zip(groups, weights, strict=True):
        if group is not None:
            product = group if weight is None else group * weight
            total = product if total is None else total + product
    if total is None:  # angles asked for, no channel has any
        return torch.zeros(())
    return total


def _blocks(inputs: AttentionInputs) -> Iterator[_Block]:
    """Cuts the neighborhoods into blocks of about ``BLOCK_ELEMENTS``, like sizes together."""
    query_offsets, key_offsets, heads = inputs.query_offsets, inputs.key_offsets, inputs.q.shape[1]
    query_sizes, key_sizes = query_offsets.diff().cpu(), key_offsets.diff().cpu()
    order = torch.argsort(key_sizes, stable=True)
    order = order[(key_sizes[order] > 0) & (query_sizes[order] > 0)]
    longest_first = list(reversed(order.tolist()))
    query_list, key_list = query_sizes.tolist(), key_sizes.tolist()
    place = 0
    while place < len(longest_first):
        first = longest_first[place]
        rows, columns = query_list[first], key_list[first]
        if rows * columns * heads > BLOCK_ELEMENTS:
            start, first_key = int(query_offsets[first]), int(key_offsets[first])
            step = max(MIN_ROWS, BLOCK_ELEMENTS // (columns * heads))
            for low in range(start, start + rows, step):
                run = slice(low, min(start + rows, low + step))
                yield _Block(_Rows(run), _Rows(slice(first_key, first_key + columns)))
            place += 1
            continue
        count = max(1, BLOCK_ELEMENTS // (rows * columns * heads))
        members = longest_first[place : place + count]
        place += len(members)
        chosen = torch.tensor(members)
        rows = int(query_sizes[chosen].max())
        query = _padded_rows(query_offsets, chosen, query_sizes, rows)
        yield _Block(query, _padded_rows(key_offsets, chosen, key_sizes, columns))


def _padded_rows(offsets: Tensor, chosen: Tensor, sizes: Tensor, longest: int) -> _Rows:
    """``(G, longest)`` rows of the chosen neighborhoods."""
    size = sizes[chosen].unsqueeze(1)
    place = torch.arange(longest).unsqueeze(0)
    exists = None if int(size.min()) == longest else (place < size).to(offsets.device)
    first = offsets[chosen.to(offsets.device)].unsqueeze(1)
    return _Rows(first + torch.minimum(place, size - 1).to(offsets.device), exists)


def legendre_derivatives(cosine: Tensor, l_max: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Evaluates ``P_l, P_l', P_l''`` for ``l = 0 .. l_max``.

    ``P_{l+1}' = P_{l-1}' + (2l + 1) P_l``, and the same relation one derivative higher.

    Args:
        cosine: any shape, cosine of the angle.
        l_max: highest degree, at least 0.

    Returns:
        ``l_max + 1`` triples of tensors of the shape of ``cosine``.
    """
    values = legendre_polynomials(cosine, l_max)
    zero = torch.zeros_like(cosine)
    first, second = [zero, torch.ones_like(cosine)], [zero, zero]
    for degree in range(1, l_max):
        first.append(first[degree - 1] + (2 * degree + 1) * values[degree])
        second.append(second[degree - 1] + (2 * degree + 1) * first[degree])
    return list(zip(values, first[: l_max + 1], second[: l_max + 1], strict=True))
