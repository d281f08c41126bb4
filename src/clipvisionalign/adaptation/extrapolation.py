"""Extrapolation of a learning curve to more captions, with an interval.

A learning curve is the rsum of models that were trained in the same way on n captions, for a few n. Four curves of two
parameters each are fitted to it:

- logarithmic, rsum = a + b log n;
- power law of what is missing, 600 - rsum = exp(a) n^(-b) (Hestness et al., arXiv:1712.00409);
- logistic between chance and 600, log((rsum - chance) / (600 - rsum)) = a + b log n, which is convex for a model
  that has learned little and concave near the end, as the curve of Rosenfeld et al. (arXiv:1909.12673) is;
- square root, rsum = a - b n^(-1/2): what is missing to a limit, which is not known, falls as the error of an estimate
  from n samples does.

No one curve fits all learning curves (Mahmood et al., arXiv:2207.01725). Their predictions are averaged, each with the
likelihood of its residuals under the noise of the figures, so that a curve without noise that one of them fits is
extrapolated exactly.

What the interval counts: a model is trained once for each n, and measured on the same images. A figure then deviates
from its curve by (1) which queries happen to be found by this model and not by that one, the noise of the images, which
a paired bootstrap over images estimates; (2) the chance of one training, and curves that are none of the four, the
misfit. Three or four points tell little about the second: its variance is that of the residuals combined with a prior,
as in the empirical Bayes estimate of Smyth (Statistical Applications in Genetics and Molecular Biology 3, 2004), with
the degrees of freedom of both. The prior is from curves that are none of the published cases of
benchmarks/learning_curve.py. With that variance s^2, (3) a further figure that a curve predicts has
s^2 (1 + g' (J'J)^-1 g), J and g being the derivatives of the curve by its parameters at the points and at the
prediction; (4) the variance between the four predictions is added. The quantile is Student's. It is the interval of the
figure that a training with so many captions would be measured with on the same images, and not that of a mean over all
trainings and images, which is less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

#: What the intervals promise.
LEVEL = 0.90
#: The highest rsum.
MAX_RSUM = 600.0
#: The misfit before the curve itself is seen: standard deviation as a share of the gain by twice the captions, and how
#: many residuals that counts as. From 13 curves of linear heads on frozen towers (drawn scenes, seed 10).
PRIOR_SHARE = 0.1
PRIOR_FREEDOM = 4.0

Transform = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Shape:
    """A curve that is a straight line of `scale(log2 captions)` once the figure is transformed.

    Attributes:
        transform: of the figure.
        inverse: of `transform`.
        derivative: of `inverse`, as a function of the figure.
        scale: of the logarithm of captions to base 2.
    """

    transform: Transform
    inverse: Transform
    derivative: Transform
    scale: Transform


@dataclass(frozen=True)
class Curve:
    """A shape with its two parameters.

    Attributes:
        shape: the shape.
        line: (2,) slope and height of the straight line.
    """

    shape: Shape
    line: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The figures of the curve.

        Args:
            x: (N,) logarithms of numbers of captions, to base 2.

        Returns:
            (N,) rsum.
        """
        return self.shape.inverse(np.polyval(self.line, self.shape.scale(x)))

    def jacobian(self, x: np.ndarray) -> np.ndarray:
        """The derivatives of rsum by both parameters.

        Args:
            x: (N,) logarithms of numbers of captions, to base 2.

        Returns:
            (N, 2).
        """
        scaled = self.shape.scale(x)
        return self.shape.derivative(self(x))[:, None] * np.stack([scaled, np.ones_like(scaled)], axis=1)

    def leverage(self, points: np.ndarray, position: np.ndarray) -> float:
        """The variance of a prediction from figures of variance one.

        Args:
            points: (K,) logarithms of the numbers of captions of the figures.
            position: (1,) that of the prediction.

        Returns:
            The variance, of the curve alone.
        """
        gradient = self.jacobian(position)[0]
        return float(gradient @ np.linalg.pinv(self.jacobian(points).T @ self.jacobian(points)) @ gradient)


@dataclass(frozen=True)
class Extrapolation:
    """A predicted rsum.

    Attributes:
        captions: number of training captions that it is of.
        value: rsum.
        low: lower end of the 90% interval.
        high: upper end.
        gain: rsum above the figure of the largest number of captions that was measured.
        gain_low: lower end of its interval.
        gain_high: upper end.
        weights: share of each curve in the prediction, by its name.
    """

    captions: int
    value: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float
    weights: dict[str, float]

    def to_dict(self) -> dict[str, object]:
        """What `--json` prints."""
        return asdict(self)

    @property
    def is_gain(self) -> bool:
        """Whether the interval of the gain is above zero."""
        return self.gain_low > 0

    @property
    def is_loss(self) -> bool:
        """Whether the interval of the gain is below zero."""
        return self.gain_high < 0


@dataclass(frozen=True)
class FittedCurve:
    """The curves fitted to K figures, and what they predict.

    Attributes:
        log_captions: (K,) logarithms of the numbers of captions, to base 2.
        curves: curves by name.
        weights: (F,) share of each in a prediction.
        variance: of one figure around its curve, in rsum squared.
        freedom: degrees of freedom of that variance.
    """

    log_captions: np.ndarray
    curves: dict[str, Curve]
    weights: np.ndarray
    variance: float
    freedom: float

    def predict(self, captions: float) -> tuple[float, float, float]:
        """Predict a figure.

        Args:
            captions: number of training captions.

        Returns:
            rsum, and both ends of its 90% interval.
        """
        position = np.atleast_1d(np.log2(captions))
        # A straight line leaves the range of rsum.
        values = np.clip([curve(position)[0] for curve in self.curves.values()], 0.0, MAX_RSUM)
        leverages = [curve.leverage(self.log_captions, position) for curve in self.curves.values()]
        value = float(self.weights @ values)
        own = self.variance * (1 + np.array(leverages))
        margin = _t_quantile(self.freedom) * float(np.sqrt(self.weights @ (own + (values - value) ** 2)))
        return value, max(value - margin, 0.0), min(value + margin, MAX_RSUM)


def extrapolate(
    captions: Sequence[int], rsum: Sequence[float], target: int, image_noise: float, chance: float = 0.0
) -> Extrapolation:
    """Predict the rsum with `target` training captions from that with fewer.

    Args:
        captions: as in `fit_learning_curve`.
        rsum: as in `fit_learning_curve`.
        target: number of training captions to predict the figure of.
        image_noise: as in `fit_learning_curve`.
        chance: as in `fit_learning_curve`.

    Returns:
        The prediction with its 90% interval.

    Raises:
        ValueError: as `fit_learning_curve`, and for a target that is not above `captions`.

    >>> predicted = extrapolate([1000, 2000, 4000], [100.0, 130.0, 160.0], 8000, 0.0)
    >>> round(predicted.value, 6), round(predicted.gain, 6)
    (190.0, 30.0)
    """
    fitted = fit_learning_curve(captions, rsum, image_noise, chance)
    if target <= captions[-1]:
        raise ValueError(f"{target} captions are not more than {captions[-1]}, which were measured")
    value, low, high = fitted.predict(target)
    shares = dict(zip(fitted.curves, fitted.weights.tolist(), strict=True))
    last = float(rsum[-1])
    return Extrapolation(target, value, low, high, value - last, low - last, high - last, shares)


def fit_learning_curve(
    captions: Sequence[int], rsum: Sequence[float], image_noise: float, chance: float = 0.0
) -> FittedCurve:
    """Fit the four curves, and estimate the variance of a figure around them.

    Args:
        captions: (K,) numbers of training captions, ascending, three or more.
        rsum: (K,) figures, 0 to 600, on the same images.
        image_noise: standard deviation in rsum of one figure around its curve, from the images alone
            (`paired_noise`).
        chance: rsum of a random ranking.

    Returns:
        The fit.

    Raises:
        ValueError: fewer than three points, or numbers that do not ascend.
    """
    x, y = np.log2(np.asarray(captions, dtype=np.float64)), np.asarray(rsum, dtype=np.float64)
    if len(x) < 3 or len(x) != len(y):
        raise ValueError(f"a learning curve needs three points or more to be extrapolated, not {len(x)}")
    if not (np.diff(x) > 0).all():
        raise ValueError(f"numbers of captions have to ascend: {', '.join(map(str, captions))}")
    curves = _fit_curves(x, y, chance)
    squares = np.array([float(((curve(x) - y) ** 2).sum()) for curve in curves.values()])
    weights = curve_weights(squares, image_noise)
    slope = float(np.polyfit(x, y, 1)[0])
    prior = image_noise**2 + (PRIOR_SHARE * slope) ** 2
    freedom = PRIOR_FREEDOM + len(x) - 2
    variance = (PRIOR_FREEDOM * prior + float(weights @ squares)) / freedom
    return FittedCurve(x, curves, weights, variance, freedom)


def paired_noise(samples: np.ndarray) -> float:
    """The standard deviation of one figure from the images alone, what all figures have in common left out.

    Args:
        samples: (R, K) bootstrap samples of K figures, each of the same images drawn.

    Returns:
        The square root of half the mean variance of the differences between two of them.
    """
    count = samples.shape[1]
    pairs = [(first, second) for first in range(count) for second in range(first)]
    variances = [float(np.var(samples[:, first] - samples[:, second])) for first, second in pairs]
    return float(np.sqrt(np.mean(variances) / 2))


def _fit_curves(x: np.ndarray, y: np.ndarray, chance: float) -> dict[str, Curve]:
    """Each curve by its name, from log2 of captions to rsum.

    A curve that a figure lies outside of (the logistic one at chance, the power law at 600) is left out.
    """
    curves: dict[str, Curve] = {}
    for name, shape in _shapes(chance).items():
        with np.errstate(all="ignore"):
            z, weight = shape.transform(y), shape.derivative(y)
        if not (np.isfinite(z).all() and np.isfinite(weight).all() and (weight > 0).all()):
            continue
        # Least squares of the residuals in rsum, to first order.
        line = np.polyfit(shape.scale(x), z, 1, w=weight)
        curves[name] = Curve(shape, line)
    return curves


def curve_weights(squares: np.ndarray, noise: float) -> np.ndarray:
    """The likelihood of each curve by its residuals, as a share.

    Args:
        squares: (F,) sums of squared residuals, in rsum squared.
        noise: standard deviation of a figure.

    Returns:
        (F,) shares that add up to one.
    """
    # Residuals below a ten-thousandth of rsum are rounding.
    excess = (squares - squares.min()) / (2 * max(noise, 1e-4) ** 2)
    likelihood = np.exp(-excess)
    return likelihood / likelihood.sum()


def _shapes(chance: float) -> dict[str, Shape]:
    reach = MAX_RSUM - chance
    return {
        "logarithmic": Shape(_same, _same, np.ones_like, _same),
        "power law": Shape(
            lambda y: np.log(MAX_RSUM - y), lambda z: MAX_RSUM - np.exp(z), lambda y: MAX_RSUM - y, _same
        ),
        "logistic": Shape(
            lambda y: np.log((y - chance) / (MAX_RSUM - y)),
            lambda z: chance + reach / (1 + np.exp(-z)),
            lambda y: (y - chance) * (MAX_RSUM - y) / reach,
            _same,
        ),
        "square root": Shape(_same, _same, np.ones_like, lambda x: 2 ** (-x / 2)),
    }


def _same(values: np.ndarray) -> np.ndarray:
    return values


def _t_quantile(freedom: float) -> float:
    """Student's two-sided quantile at `LEVEL`."""
    from scipy.special import stdtrit

    return float(-stdtrit(freedom, (1 - LEVEL) / 2))
