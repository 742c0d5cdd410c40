import colorsys
import torch
from PIL import Image, ImageDraw
from mergevq.evaluation.token_map import to_pil


def draw(images, sources, matches, grid, cell=384, gap=32, lines=16):
    rows, columns = grid
    side = cell
    n = len(matches.first)
    where = [anchor(s, t, grid) for s, t in zip(sources, (matches.first, matches.second))]  # [M,2] row,col
    order = (where[0][:, 0] * columns + where[0][:, 1]).argsort().argsort()
    palette = torch.tensor([colour(int(o), n) for o in order])
    out = Image.new("RGB", (2 * cell + gap, cell), "white")
    for i, (image, source, toks) in enumerate(zip(images, sources, (matches.first, matches.second))):
        scale = -(-cell // image.shape[-1])
        k = int(source.max()) + 1
        table = torch.full((k, 3), float('nan'))
        table[toks] = palette
        which = torch.full((k,), -1); which[toks] = torch.arange(n)
        pm = table[source].reshape(rows, columns, 3).permute(2, 0, 1)
        idm = which[source].reshape(rows, columns)
        up = lambda v: v.repeat_interleave(image.shape[1] // rows * scale, -2).repeat_interleave(image.shape[2] // columns * scale, -1)
        tint, ident = up(pm), up(idm)
        grey = (image.mean(0).repeat_interleave(scale, 0).repeat_interleave(scale, 1))
        light = (0.45 + 0.5 * grey).expand(3, -1, -1)
        pic = torch.where(ident >= 0, tint * 0.72 + 0.28 * grey, light)
        edge = torch.zeros_like(ident, dtype=torch.bool)
        edge[1:] |= ident[1:] != ident[:-1]; edge[:, 1:] |= ident[:, 1:] != ident[:, :-1]
        pic = torch.where(edge, pic * 0.4 - 0.5, pic)
        out.paste(to_pil(pic, cell), (i * (cell + gap), 0))
    over = Image.new("RGB", (out.width * 2, out.height * 2)); 
    pen = ImageDraw.Draw(out, "RGBA")
    for m in range(min(lines, n)):
        pts = []
        for i in range(2):
            r, c = where[i][m].tolist()
            pts.append((i * (cell + gap) + (c + .5) * cell / columns, (r + .5) * cell / rows))
        rgb = tuple(int((v + 1) * 127.5) for v in palette[m])
        pen.line(pts, (255, 255, 255, 200), 4); pen.line(pts, rgb + (255,), 2)
        for x, y in pts: pen.ellipse((x - 5, y - 5, x + 5, y + 5), rgb, "white", 2)
    return out


def colour(rank, n):
    return [2 * v - 1 for v in colorsys.hls_to_rgb(0.92 * rank / max(1, n), (0.5, 0.62, 0.42)[rank % 3], 0.85)]


def anchor(source, toks, grid):
    rows, columns = grid
    r = torch.arange(rows * columns) // columns; c = torch.arange(rows * columns) % columns
    res = []
    for t in toks.tolist():
        inside = (source == t).nonzero()[:, 0]
        cr, cc = r[inside].float().mean(), c[inside].float().mean()
        best = inside[((r[inside] - cr) ** 2 + (c[inside] - cc) ** 2).argmin()]
        res.append([int(r[best]), int(c[best])])
    return torch.tensor(res)
