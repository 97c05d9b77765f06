"""What computing a prompt costs here, learned from the engine's own steps. Pure: no clock, no numpy.

A step takes about c0 + c1 * tokens + c2 * (token, context) pairs: what every step costs, what every token costs, and
attention. The three are fitted, all at least 0, to the time per token of past steps; old steps are forgotten, and one
that took far longer than expected (the machine was busy elsewhere) counts little.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations

_FORGETTING = 0.99  # a step counts half after 69 more
_LEAST_TOKENS = 16  # steps of fewer prompt tokens say nothing about prompts
_OUTLIER = 3.0  # a residual of more than so many usual ones counts as so many
_NOISE = 0.02  # of the expected time: no machine is steadier
_RIDGE = 1e-3  # holds what the steps do not tell apart near the first guess
_PAIRS_UNIT = 1024.0  # context is counted in these, so that all three features are of one size
_STEP_UNIT = 256.0

Vector = tuple[float, float, float]


class CostModel:
    """`tokens_per_step` is how many prompt tokens a step takes at most, for what every step costs."""

    def __init__(self, *, tokens_per_step: int) -> None:
        if tokens_per_step < 1:
            raise ValueError(f"tokens_per_step must be at least 1, got {tokens_per_step}")
        self._tokens_per_step = tokens_per_step
        self._products = [[0.0] * 3 for _ in range(3)]  # of features with features, decayed
        self._targets = [0.0] * 3  # of features with times
        self._guess: Vector | None = None
        self._fit: Vector | None = None
        self._usual_residual_s = 0.0

    def observe(self, rows: Iterable[tuple[int, int]], *, step_s: float) -> None:
        """A step computed `rows`, each (first token, number of tokens), in `step_s`. Steps of decodes say nothing."""
        steps = [(first, count) for first, count in rows if count > 0]
        if not any(count >= _LEAST_TOKENS for _, count in steps) or step_s <= 0:
            return
        num_tokens = sum(count for _, count in steps)
        features = (
            _STEP_UNIT / num_tokens,
            1.0,
            sum(_pairs(first, count) for first, count in steps) / num_tokens / _PAIRS_UNIT,
        )
        self._learn(features, step_s / num_tokens)

    def seconds(self, first_token: int, num_tokens: int) -> float | None:
        """Of computing tokens `first_token` .. + `num_tokens` alone. None: nothing was learned yet.

        It adds up: two ranges that touch take as long as the one they make.
        """
        if self._fit is None:
            return None
        per_step, per_token, per_pair = self._fit
        each_s = per_step * _STEP_UNIT / self._tokens_per_step + per_token
        return each_s * num_tokens + per_pair * _pairs(first_token, num_tokens) / _PAIRS_UNIT

    def check(self) -> None:
        assert self._fit is None or all(0.0 <= value < float("inf") for value in self._fit), self._fit

    def _learn(self, features: Vector, target_s: float) -> None:
        weight = 1.0
        if self._fit is None:
            self._guess = (0.0, target_s, 0.0)
        else:
            weight = self._weigh(target_s, expected_s=_dot(self._fit, features))
        for i, row in enumerate(self._products):
            for j in range(3):
                row[j] = _FORGETTING * row[j] + weight * features[i] * features[j]
            self._targets[i] = _FORGETTING * self._targets[i] + weight * features[i] * target_s
        self._fit = self._solve()

    def _weigh(self, target_s: float, *, expected_s: float) -> float:
        residual_s = abs(target_s - expected_s)
        usual_s = max(self._usual_residual_s, _NOISE * expected_s)
        # Clipped as well: one outlier must not make the next one look usual.
        self._usual_residual_s = usual_s + 0.1 * (min(residual_s, 2 * _OUTLIER * usual_s) - usual_s)
        return min(1.0, _OUTLIER * usual_s / residual_s) if residual_s > 0 else 1.0

    def _solve(self) -> Vector:
        """Least squares with no coefficient below 0: the best of the solutions on each set of the three."""
        assert self._guess is not None
        products = [
            [value + (_RIDGE if i == j else 0.0) for j, value in enumerate(row)]
            for i, row in enumerate(self._products)
        ]
        targets = [value + _RIDGE * guess for value, guess in zip(self._targets, self._guess, strict=True)]
        best: Vector = (0.0, 0.0, 0.0)
        best_loss = 0.0
        for size in (1, 2, 3):
            for chosen in combinations(range(3), size):
                values = _solved(
                    [[products[i][j] for j in chosen] for i in chosen], [targets[i] for i in chosen]
                )
                if values is None or min(values) < 0.0:
                    continue
                # At a minimum on its set, the loss is a constant less the products with the targets.
                loss = -sum(value * targets[i] for value, i in zip(values, chosen, strict=True))
                if loss < best_loss:
                    known = dict(zip(chosen, values, strict=True))
                    best, best_loss = (known.get(0, 0.0), known.get(1, 0.0), known.get(2, 0.0)), loss
        return best


class CopyRate:
    """What a copy between pages and memory costs, learned from those made."""

    def __init__(self, *, prior_bytes_s: float = 2e9) -> None:
        self._bytes_s = prior_bytes_s

    def observe(self, num_bytes: int, *, copy_s: float) -> None:
        if num_bytes > 0 and copy_s > 0:
            # In seconds a byte, not bytes a second: one copy that seemed to take no time must not count for all.
            seconds_per_byte = 0.9 / self._bytes_s + 0.1 * copy_s / num_bytes
            self._bytes_s = 1.0 / seconds_per_byte

    def seconds(self, num_bytes: int) -> float:
        return num_bytes / self._bytes_s


def _pairs(first_token: int, num_tokens: int) -> float:
    """How many (token, token it looks at) pairs there are, itself included."""
    return num_tokens * (first_token + (num_tokens + 1) / 2)


def _dot(left: Vector, right: Vector) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


def _solved(matrix: list[list[float]], values: list[float]) -> Sequence[float] | None:
    """Gauss elimination of a positive definite matrix, which needs no exchange of rows. None: it is singular."""
    size = len(values)
    rows = [[*row, value] for row, value in zip(matrix, values, strict=True)]
    for i in range(size):
        if rows[i][i] <= 1e-12:
            return None
        for j in range(i + 1, size):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [below - factor * above for below, above in zip(rows[j], rows[i], strict=True)]
    solution = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * solution[j] for j in range(i + 1, size))
        solution[i] = (rows[i][size] - known) / rows[i][i]
    return solution
