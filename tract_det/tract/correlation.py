"""`X^T X` of overlapping windows from the images' correlation with themselves.

Space-to-depth turns stride `s` into stride 1 over `C * sh * sw` channels. Suppose that the windows
went on past the border until they no longer touched the image. Then an entry of `X^T X` would
depend only on the lag between its two taps: it would be a value of the image's correlation with
itself, which the FFT computes. The windows that cross the border see only narrow strips of the
image; their contribution is computed from these strips and subtracted. Symbols: see `gram`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tract_det.tract.windows import BLOCK_BYTES, Windows, crop

# Rows in one transform at most, and transforms in one block at least. An image is cut into bands
# because the cross-spectra are products over the batch, which are slow for few images; the bands of
# one image count as a batch. Measurements: benchmarks/tract_design_notes.md.
_BAND = 64
_TRANSFORMS = 5
# Bytes of cross-spectra that exist at a time; half or twice as many make no difference.
_SPECTRA_BYTES = 2 * 2**20


def _fft_size(least: int) -> int:
    """The smallest size from `least` on without prime factors above 5: such FFTs are faster."""
    size = least
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1


def _toeplitz(lags: Tensor, taps: int) -> Tensor:
    """The Toeplitz matrix with lag `j - i` at `(i, j)`.

    Args:
        lags: `(..., 2 taps - 1)`, from lag `1 - taps` to `taps - 1`.
        taps: rows and columns.

    Returns:
        `(..., taps, taps)`.
    """
    return lags.unfold(-1, taps, 1).flip(-2)


def _lags(spectra: Tensor, width: int, reach: tuple[int, int]) -> Tensor:
    """Correlations at the lags that are needed, from the spectra that `_add_lags_of` has summed.

    Args:
        spectra: `(nh, 2 reach_w + 1, C * C)`; along the width these are lags already.
        width: C.
        reach: largest lag, (height, width).

    Returns:
        `(C, C, 2 reach_h + 1, 2 reach_w + 1)`; channel i times channel j, shifted by the lag.
    """
    nh = spectra.shape[0]
    inverse = _inverse_dft(torch.arange(reach[0] + 1, device=spectra.device), nh, nh)
    lags = (inverse @ spectra.flatten(1)).real.reshape(reach[0] + 1, -1, width, width)
    lags = lags.permute(2, 3, 0, 1)
    # The other half: lag -d from i to j is lag d from j to i.
    return torch.cat((lags.flip(2, 3).transpose(0, 1)[:, :, :-1], lags), 2)


def _inverse_dft(lags: Tensor, size: int, columns: int) -> Tensor:
    """Rows of the inverse DFT of `size` points at these lags, `(lags, columns)`.

    With fewer `columns` than `size` they apply to half a spectrum, as `rfft` returns it: the real
    part is the result, and all frequencies count twice except those that are their own conjugates.
    """
    frequency = torch.arange(columns, device=lags.device)
    phase = torch.outer(lags, frequency).double() * (-2 * math.pi / size)
    weight = torch.ones_like(frequency, dtype=torch.float64)
    if columns < size:
        weight += ((frequency > 0) & (2 * frequency < size)).double()
    return torch.polar((weight / size).expand_as(phase).contiguous(), phase)


def _add_lags_of(y: Tensor, spectra: Tensor, inverse: Tensor) -> None:
    """Adds the cross-spectra of all pairs of channels, summed over the batch, to `spectra`.

    The cross-spectra are huge and few lags are needed, so each part of them is transformed along
    the width at once.

    Args:
        y: `(B, C, nh, nw)`; rows and columns end with as many zeros as the largest lag.
        spectra: `(nh, lags, C * C)`, changed in place.
        inverse: inverse DFT along the width, `(lags, nw // 2 + 1)`.
    """
    spectrum = torch.fft.rfft2(y)
    step = max(1, _SPECTRA_BYTES // (inverse.shape[1] * y.shape[1] ** 2 * 16))
    for row in range(0, len(spectra), step):
        # One small product for each frequency; the copy puts each in the order that BLAS takes.
        channels = spectrum[:, :, row : row + step].permute(2, 3, 1, 0).contiguous()
        spectra[row : row + step] += inverse @ (channels @ channels.mH).flatten(2)


def _slide(first: Tensor, last: Tensor) -> Tensor:
    """Gram sum of the windows of `q + 1` rows that reach into the image by 1 to q rows only.

    Args:
        first: Gram sums of the taps on the first q rows of the image, `(C, q, w, C, q, w)`.
        last: the same for the last q rows.

    Returns:
        `(C, q + 1, w, C, q + 1, w)`.
    """
    q = first.shape[1]
    total = F.pad(torch.zeros_like(first), (0, 0, 0, 1, 0, 0, 0, 0, 0, 1))
    for i in range(1, q + 1):
        total[:, q + 1 - i :, :, :, q + 1 - i :] += first[:, :i, :, :, :i]
        total[:, :i, :, :, :i] += last[:, q - i :, :, :, q - i :]
    return total


def _row_edges(y: Tensor, q: int, taps: int) -> Tensor:
    """Gram sum of the windows that cross the first or the last row, at every column.

    Args:
        y: `(B, C, H, W)`; each row ends with `taps - 1` zeros.
        q: height of the windows minus one.
        taps: width of the windows.

    Returns:
        `(C, q + 1, taps, C, q + 1, taps)`.
    """
    C = y.shape[1]
    # One signal for each channel and row of the two strips, in which the images follow each other.
    # The zeros keep them apart, so these sums too depend only on lags, and no window is copied.
    flat = torch.stack((y[:, :, :q], y[:, :, -q:])).permute(0, 2, 3, 1, 4).reshape(2, C * q, -1)
    size = flat.shape[2] - taps + 1
    lags = [flat[..., :size] @ flat[..., i : i + size].mT for i in range(taps)]
    lags = [lag.mT for lag in lags[:0:-1]] + lags
    gram = _toeplitz(torch.stack(lags, -1), taps).unflatten(2, (C, q)).unflatten(1, (C, q))
    first, last = gram.permute(0, 1, 2, 5, 3, 4, 6)
    return _slide(first, last)


def _column_edges(y: Tensor, q: int, taps: int) -> Tensor:
    """Gram sum of the windows that cross the first or the last column, but no border row.

    Args:
        y: `(B, C, H, W)`.
        q: width of the windows minus one.
        taps: height of the windows.

    Returns:
        `(C, taps, q + 1, C, taps, q + 1)`.
    """
    C = y.shape[1]
    strips = torch.stack((y[..., :q], y[..., -q:])).unfold(3, taps, 1)
    X = strips.permute(0, 2, 4, 5, 1, 3).reshape(2, C * q * taps, -1)
    first, last = (X @ X.mT).unflatten(2, (C, q, taps)).unflatten(1, (C, q, taps))
    return _slide(first, last).permute(0, 2, 1, 3, 5, 4)


def correlation_sum(x: Tensor, windows: Windows) -> tuple[Tensor, int]:
    """`X^T X` of windows without dilation, from correlations and border strips.

    Args:
        x: `(B, C, H, W)`.
        windows: on these images; `dilation` must be 1.

    Returns:
        `(1, K, K)`, float64, of the windows in the first output rows; and the number of these rows.
        The few remaining rows do not fill a band.
    """
    (kh, kw), (sh, sw), _, origin, (Ho, Wo) = windows
    C = x.shape[1]
    # After space-to-depth: taps of a window, and how far it reaches beyond its first one.
    th, tw = -(-kh // sh), -(-kw // sw)
    qh, qw = th - 1, tw - 1
    channels = C * sh * sw
    # Bands of `rows` window rows. The zeros after each keep the correlation from wrapping around.
    nw = _fft_size(Wo + 2 * qw)
    most = min(_BAND, BLOCK_BYTES // (_TRANSFORMS * channels * nw * 8)) - 2 * qh
    bands = -(-Ho // max(1, most))
    rows = Ho // bands
    nh = _fft_size(rows + 2 * qh)
    room = max(1, BLOCK_BYTES // (channels * nh * nw * 8))
    images = min(len(x), max(1, room // bands))
    bands_at_once = min(bands, room)

    inverse = _inverse_dft(torch.arange(-qw, qw + 1, device=x.device), nw, nw // 2 + 1)
    spectra = torch.zeros((nh, 2 * qw + 1, channels**2), dtype=torch.complex128, device=x.device)
    edges = torch.zeros((channels, th, tw, channels, th, tw), dtype=torch.float64, device=x.device)
    buffer = torch.zeros(
        (images, bands_at_once, C, sh, sw, nh, nw), dtype=torch.float64, device=x.device
    )
    columns = (origin[1], origin[1] + (Wo + qw) * sw)
    for band in range(0, bands, bands_at_once):
        count = min(bands_at_once, bands - band)
        first = origin[0] + band * rows * sh
        for block in x.split(images):
            pixels = crop(block, (first, first + (count * rows + qh) * sh), columns)
            depth = pixels.unflatten(3, (-1, sw)).unflatten(2, (-1, sh)).unfold(2, rows + qh, rows)
            y = buffer[: len(block), :count]
            y[..., : rows + qh, : Wo + qw] = depth.permute(0, 2, 1, 3, 5, 6, 4)
            y = y.view(-1, channels, nh, nw)
            if qh:
                edges += _row_edges(y[:, :, : rows + qh, : Wo + 2 * qw], qh, tw)
            if qw:
                edges += _column_edges(y[:, :, : rows + qh, : Wo + qw], qw, th)
            _add_lags_of(y, spectra, inverse)

    lags = _lags(spectra, channels, (qh, qw))
    gram = _toeplitz(_toeplitz(lags.mT, th).movedim(2, -1), tw)  # (i, j, h, h', w, w')
    gram = gram.permute(0, 2, 4, 1, 3, 5) - edges
    return _depth_to_space(gram, C, windows), bands * rows


def _depth_to_space(gram: Tensor, C: int, windows: Windows) -> Tensor:
    """A Gram sum after space-to-depth, `(C sh sw, th, tw, C sh sw, th, tw)`, as `(1, K, K)`."""
    (kh, kw), (sh, sw), *_ = windows
    _, th, tw, *_ = gram.shape
    gram = gram.reshape(C, sh, sw, th, tw, C, sh, sw, th, tw).permute(0, 3, 1, 4, 2, 5, 8, 6, 9, 7)
    gram = gram.reshape(C, th * sh, tw * sw, C, th * sh, tw * sw)
    # The last taps may lie beyond the kernel. Without them the result may be a view with gaps, but
    # the operator promises a contiguous tensor.
    return gram[:, :kh, :kw, :, :kh, :kw].reshape(1, C * kh * kw, C * kh * kw).contiguous()
