"""Blur kernels: Gaussian, camera shake, and the bicubic filter of Keys (1981). All are float64 and sum to 1."""

from math import cos, hypot, pi, sin

import torch
from jaxtyping import Float
from torch import Tensor

from invdiff.errors import InputError


def gaussian_kernel(size: int | tuple[int, int], std: float | tuple[float, float]) -> Float[Tensor, "kh kw"]:
    """Gaussian sampled at the pixels, cut at the kernel's edge and normalised.

    Parameters
    ----------
    size
        Samples an axis, at least 1. The centre is (size - 1) / 2: a pixel for odd sizes, between two for even ones,
        where a blur then also shifts the picture by half a pixel.
    std
        Standard deviation in pixels, positive; one or (vertical, horizontal).

    Raises
    ------
    InputError
        If size or std is not positive.
    """
    sizes, stds = (size, size) if isinstance(size, int) else size, (std, std) if isinstance(std, (int, float)) else std
    if min(sizes) < 1 or not min(stds) > 0:
        raise InputError(f"gaussian_kernel needs size >= 1 and std > 0, got size={size}, std={std}.")
    sides = []
    for n, s in zip(sizes, stds, strict=True):
        t = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) / s
        g = torch.exp(-0.5 * t**2)
        sides.append(g / g.sum())
    return torch.outer(sides[0], sides[1])


def motion_kernel(size: int, intensity: float = 0.5, seed: int = 0) -> Float[Tensor, "k k"]:
    r"""Kernel of a random camera shake: the time that the picture's image of a point spends over every pixel.

    The camera moves at constant speed along a path of 2000 points. At each point its direction is turned by Gaussian
    jitter, drawn back towards the start (the hand corrects), and, rarely, turned round by a shake, as in the
    trajectories of Boracchi & Foi (2012, IEEE Trans. Image Process. 21(8), 3502-3517); their model of exposure and
    noise is left out. The path is centred on its mean, shrunk if it leaves the kernel, and spread over the pixels
    bilinearly, so the kernel's centre of mass is its centre exactly for odd sizes and the blur does not shift the
    picture.

    Parameters
    ----------
    size
        Samples an axis, at least 3.
    intensity
        Shakiness in [0, 1]: 0 is a straight line, 1 a tangle.
    seed
        Seed of the trajectory; the same on every device.

    Raises
    ------
    InputError
        If size or intensity is out of range.
    """
    if size < 3 or not 0.0 <= intensity <= 1.0:
        raise InputError(
            f"motion_kernel needs size >= 3 and intensity in [0, 1], got size={size}, intensity={intensity}."
        )
    points = 2000
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    jitter = torch.randn(points, 2, generator=generator, dtype=torch.float64).tolist()
    shake = torch.rand(points, 2, generator=generator, dtype=torch.float64).tolist()
    length = (size - 1) * (0.5 + 0.5 * start[0]) * (1.0 + intensity)
    angle = 2.0 * pi * start[1]
    vx, vy, x, y, path = cos(angle), sin(angle), 0.0, 0.0, []
    # x and y are in units of the path's length. Jitter scales with the root of the time step: a diffusion of the
    # direction.
    kick, pull, chance = 3.0 * intensity / points**0.5, 40.0 * intensity / points, 5.0 * intensity / points
    for (jx, jy), (event, turn) in zip(jitter, shake, strict=True):
        vx, vy = vx + kick * jx - pull * x, vy + kick * jy - pull * y
        if event < chance:
            turned = pi * (0.5 + turn)
            vx, vy = cos(turned) * vx - sin(turned) * vy, sin(turned) * vx + cos(turned) * vy
        speed = hypot(vx, vy) or 1.0
        vx, vy = vx / speed, vy / speed
        x, y = x + vx / points, y + vy / points
        path.append((x, y))
    p = length * torch.tensor(path, dtype=torch.float64)
    p = p - p.mean(0)
    half = (size - 1) / 2
    p = p * min(1.0, half / float(p.abs().max())) + half
    low = p.floor().clamp(0, size - 2)
    f = p - low
    kernel = torch.zeros(size * size, dtype=torch.float64)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = (f[:, 1] if dy else 1.0 - f[:, 1]) * (f[:, 0] if dx else 1.0 - f[:, 0])
        kernel.index_add_(0, ((low[:, 1] + dy) * size + low[:, 0] + dx).long(), weight)
    return (kernel / kernel.sum()).reshape(size, size)


def keys_cubic(t: Tensor) -> Tensor:
    """Cubic filter of Keys (1981, IEEE Trans. ASSP 29(6), 1153-1160) with a = -1/2; zero for abs(t) >= 2."""
    t = t.abs()
    near = (1.5 * t - 2.5) * t**2 + 1.0
    far = ((-0.5 * t + 2.5) * t - 4.0) * t + 2.0
    return torch.where(t < 1.0, near, torch.where(t < 2.0, far, torch.zeros_like(t)))


def bicubic_kernel(factor: int) -> Float[Tensor, "k k"]:
    """Anti-aliasing filter of down-sampling: Keys' cubic stretched by the factor, 4 factor samples an axis.

    Equals the weights of `Downsampling` away from the picture's border.

    Parameters
    ----------
    factor
        Down-sampling factor, at least 1.

    Raises
    ------
    InputError
        If factor is below 1.
    """
    if factor < 1:
        raise InputError(f"bicubic_kernel needs an integer factor >= 1, got {factor}.")
    side = keys_cubic((torch.arange(4 * factor, dtype=torch.float64) - (4 * factor - 1) / 2) / factor)
    return torch.outer(side, side) / side.sum() ** 2
