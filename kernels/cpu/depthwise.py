"""Convolutions of images in which every channel of the result sees one channel of the image (depthwise), and their
gradients, straight from the definition: a row of the result is the sum of as many weighted rows of the image as there are
taps. There is nothing to gain by products of matrices, for each has but one row.

`times` channels of the result belong to each channel of the image. Sizes, stride, padding and dilation are those of the
convolution, also in the gradients.
"""

from __future__ import annotations

from jitgrad.kernels.cpu.math import maximum, minimum
from jitgrad.kernels.cpu.scalar import f32 as T
from jitgrad.kernels.cpu.standins import i64, load, pointer, store
from jitgrad.kernels.cpu.template import text
from jitgrad.kernels.cpu.tile import dot_rows, make_panel, weighted_rows

ARGUMENTS = ("images", "channels", "height", "width", "times", "out_height", "out_width", "kernel_height", "kernel_width",
             "stride_y", "stride_x", "top", "left", "apart", "beside")
"""The integers of all kernels: the image, the result, the taps, strides, padding and dilations. Behind them, for the
gradient in the image: of how many taps a position meets one, down and across; and of how many rows at once."""


def source(kernel: str, element: str) -> str:
    """The text of one of `KERNELS` for ``f32`` or ``f64``."""
    return text(KERNELS[kernel], T=element)


def depthwise(args, begin, end, thread):
    """Arguments: image, weights, result; `ARGUMENTS`. Items: planes of the result."""
    x, w, o = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T)
    channels, height, width, times, out_height, out_width = args[5], args[6], args[7], args[8], args[9], args[10]
    tall, wide, down, across, top, left = args[11], args[12], args[13], args[14], args[15], args[16]
    apart, beside = args[17], args[18]
    for item in range(begin, end):
        plane = item // times * height * width
        channel = item % (channels * times)
        begin_y = minimum(i64((top + down - 1) // down), out_height)         # rows whose taps all meet the image
        end_y = maximum(minimum(i64((height - 1 - (tall - 1) * apart + top) // down + 1), out_height), begin_y)
        y = i64(0)
        while y < out_height:
            row, rows = y * down - top, i64(1)
            first, last = i64(0), i64(tall)
            if begin_y <= y < end_y:
                rows = i64(end_y - y)
            else:
                first = maximum(i64(-(row // apart)), i64(0))
                last = maximum(minimum(i64((height - 1 - row) // apart + 1), tall), first)
            weighted_rows(rows, out_width, down * width, across, 1, 0, last - first, apart * width, wide, beside,
                          left, left + width, x, plane + (row + first * apart) * width - left,
                          w, (channel * tall + first) * wide, 0, wide, 1,
                          o, (item * out_height + y) * out_width, out_width)
            y += rows


def depthwise_input_gradient(args, begin, end, thread):
    """Arguments: gradient, weights, gradient in the image; `ARGUMENTS`. Items: planes of the image.

    Position p and tap t meet place (p + padding - t * dilation) / stride, where that is a whole number: every so many-th
    tap, `step` places from one to the next."""
    g, w, o = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T)
    channels, height, width, times, out_height, out_width = args[5], args[6], args[7], args[8], args[9], args[10]
    tall, wide, down, across, top, left = args[11], args[12], args[13], args[14], args[15], args[16]
    apart, beside, every_y, every_x, rows_at_once = args[17], args[18], args[19], args[20], args[21]
    step_y, step_x = every_y * apart // down, every_x * beside // across
    panel = make_panel(o)
    for item in range(begin, end):
        channel = item % channels
        for start in range(min(down, height)):                      # rows that meet the same taps
            count_y = i64((height - start + down - 1) // down)
            row_tap, taps_y = i64(0), i64(tall)
            while row_tap < tall and (start + top - row_tap * apart) % down != 0:
                row_tap += 1
            taps_y = i64((tall - row_tap + every_y - 1) // every_y)
            shift = i64((start + top - row_tap * apart) // down)
            begin_y = minimum(maximum(i64((taps_y - 1) * step_y - shift), i64(0)), count_y)
            end_y = maximum(minimum(i64(out_height - shift), count_y), begin_y)
            y = i64(0)
            while y < count_y:
                row, rows = i64(y + shift), i64(1)
                first, last = i64(0), i64(taps_y)
                if begin_y <= y < end_y:
                    rows = minimum(i64(end_y - y), rows_at_once)
                else:
                    first = maximum(i64(-((out_height - 1 - row) // step_y)), i64(0))
                    last = maximum(minimum(i64(row // step_y + 1), taps_y), first)
                target = (item * height + start + y * down) * width
                line, place, line_step = o, target, i64(down * width)
                if across > 1:
                    line, place, line_step = panel, i64(0), i64((width + across - 1) // across)
                for phase in range(min(across, width)):
                    tap, taps, column, count = i64(0), i64(wide), i64(phase + left), i64(width)
                    if across > 1:
                        while tap < wide and (column - tap * beside) % across != 0:
                            tap += 1
                        taps, column = i64((wide - tap + every_x - 1) // every_x), i64((column - tap * beside) // across)
                        count = i64((width - phase + across - 1) // across)
                    weighted_rows(rows, count, out_width, 1, times, out_height * out_width, last - first,
                                  -step_y * out_width, taps, -step_x, -column, out_width - column,
                                  g, item * times * out_height * out_width + (row - first * step_y) * out_width + column,
                                  w, (channel * times * tall + row_tap + first * every_y) * wide + tap,
                                  tall * wide, every_y * wide, every_x, line, place, line_step)
                    place += rows * line_step
                if across > 1:
                    for n in range(rows):
                        place, wanted = i64(n * line_step), i64(target + n * down * width)
                        if across == 2:                             # both at once is a store of whole vectors
                            other = i64(place + rows * line_step)
                            for k in range(width // 2):
                                store(o, wanted + 2 * k, load(panel, place + k, 3, 4), 2, 4)
                                store(o, wanted + 2 * k + 1, load(panel, other + k, 3, 4), 2, 4)
                            if width % 2 == 1:
                                store(o, wanted + width - 1, load(panel, place + width // 2, 3, 4), 2, 4)
                        else:
                            for phase in range(min(across, width)):
                                for k in range((width - phase + across - 1) // across):
                                    store(o, wanted + phase + k * across, load(panel, place + k, 3, 4), 2, 4)
                                place += rows * line_step
                y += rows


def depthwise_weight_gradient(args, begin, end, thread):
    """Arguments: image, gradient, gradient in the weights; `ARGUMENTS`. Items: channels of the result."""
    x, g, o = pointer(args, 1, T), pointer(args, 2, T), pointer(args, 3, T)
    images, channels, height, width, times = args[4], args[5], args[6], args[7], args[8]
    out_height, out_width, tall, wide, down, across = args[9], args[10], args[11], args[12], args[13], args[14]
    top, left, apart, beside = args[15], args[16], args[17], args[18]
    for item in range(begin, end):
        for i in range(tall):
            row = i * apart - top
            first = maximum(i64(-(row // down)), i64(0))
            last = maximum(minimum(i64((height - 1 - row) // down + 1), out_height), first)
            place = (item * tall + i) * wide
            for j in range(wide):
                store(o, place + j, T(0), 2, 3)
            for image in range(images):
                plane = (image * channels + item // times) * height * width
                other = (image * channels * times + item) * out_height * out_width
                dot_rows(last - first, out_width, down * width, across, wide, beside, left, left + width,
                         x, plane + (first * down + row) * width - left, g, other + first * out_width, out_width, o, place)


KERNELS = {kernel.__name__: kernel for kernel in (depthwise, depthwise_input_gradient, depthwise_weight_gradient)}
"""Each by its name."""
