"""PNG, JPEG or TIFF fields, with masks for some and labels for others -> slides to train on.

    python -m extras.images fields slides --mpp 0.5 --masks masks --labels labels.csv
    python -m extras.images fields slides --mpp 0.5 --masks masks --tumour 1 3   # masks of classes
    python -m extras.images fields slides --mpp 0.5 --masks masks --case "TCGA-..-...."
    python train.py --data slides --mpp 0.5 --tile 224           # tiles no larger than the fields

Subfolders stay: train* and test* are the split. Each field becomes a pyramid TIFF and an ASAP XML,
made from

* its mask (of the same stem; where that repeats, in the same subfolder): outlines, equal in every
  pixel. Tumour is what is not 0, or the values of --tumour; all the rest counts as not tumour.
* without a mask, its row `name,cancer` or `name,normal` of labels.csv: one region, the whole field.
  A name is a path below the folder, with or without suffix, or a file name that occurs once.
* with neither: nothing. A warning lists them.

--case is a regular expression, searched in the path below the folder. Fields with the same group 1
(or whole match) are of one patient; a split drawn at random keeps them on one side. Their slides
are called patient_NNN_node_M, and fields.csv says which is which.
"""

import argparse
import csv
import os
import re
import shutil
import signal
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import data
from extras import outline, synthetic
from slide import DataError, warn

SUFFIXES = ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp"
FIELD_MODES = "L", "LA", "P", "RGB", "RGBA"
MASK_MODES = *FIELD_MODES, "1", "I", "I;16", "I;16B"
QUALITY = 95  # of the JPEG tiles: many fields are JPEG already
Image.MAX_IMAGE_PIXELS = 1 << 29  # in memory at once; above, Pillow warns, then refuses


def images_below(root):
    """Images below the folder `root` -> their paths from there, sorted."""
    try:
        files = [path.relative_to(root) for path in data.walk(root, set())]
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; give a folder of images") from None
    images = sorted(path for path in files if path.suffix.lower() in SUFFIXES)
    others = [str(p) for p in files if p.suffix.lower() not in (*SUFFIXES, ".csv")]
    warn(f"files in {root} are not read, their suffix is none of {' '.join(SUFFIXES)}", others)
    if not images:
        raise DataError(f"{root}: no images; give the folder that holds {' '.join(SUFFIXES)}")
    return images


def check_names(root, fields):
    """DataError where two fields would be one slide, or data.find_slides would skip the slide."""
    seen = {}
    for field in fields:
        if field.stem.lower().endswith(data.NO_SLIDES):
            raise DataError(f"{root / field}: named as a mask is; give masks a folder of their own")
        other = seen.setdefault((field.parent, field.stem.lower()), field)
        if other != field:
            raise DataError(f"{root / other}, {root / field}: they would be one slide; rename one")


def match_masks(root, fields, masks):
    """{field: its mask}: the one of its stem; where several have it, the one in its subfolder."""
    by_stem = defaultdict(lambda: ([], []))
    for n, paths in enumerate((fields, masks)):
        for path in paths:
            by_stem[path.stem.lower()][n].append(path)
    mask_of = {}
    for alike, same in by_stem.values():
        if len(alike) == len(same) == 1:
            mask_of[alike[0]] = same[0]
            continue
        for field in alike:
            own = [mask for mask in same if mask.parent == field.parent]
            elsewhere = {mask.parent for mask in same} - {other.parent for other in alike}
            if len(own) > 1 or elsewhere and not own:
                several = ", ".join(map(str, own or same))
                cure = "name the subfolders of masks as those of fields, one mask in each"
                raise DataError(f"{root / field}: which is its mask, {several}? {cure}")
            mask_of |= {field: mask for mask in own}
    warn("masks are of no field", sorted(map(str, {*masks} - {*mask_of.values()})))
    return mask_of


def read_labels(path, fields):
    """labels.csv -> {field: "cancer" or "normal"}; its delimiter is a comma, semicolon or tab."""
    by_path, by_name, label_of, unknown = {}, defaultdict(list), {}, []
    for field in fields:
        by_path |= {str(field.with_suffix("")): [field], str(field): [field]}
        by_name[field.stem].append(field)
        by_name[field.name].append(field)
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable ({error}); save it as UTF-8") from None
    delimiter = max(",;\t", key="".join(lines[:1]).count)
    for n, row in enumerate(csv.reader(lines, delimiter=delimiter), 1):
        row = [cell.strip() for cell in row if cell.strip()]
        if not row or n == 1 and [cell.lower() for cell in row] == ["name", "label"]:
            continue
        if len(row) != 2 or row[1].lower() not in ("cancer", "normal"):
            raise DataError(f"{path}: line {n} is {row}; write name,cancer or name,normal")
        name, label = row[0].replace("\\", "/"), row[1].lower()
        matches = by_path.get(name) or by_name.get(name, [])
        if len(matches) > 1:
            several = ", ".join(map(str, matches))
            raise DataError(f"{path}: line {n}: {name} may be {several}; write its whole path")
        for field in matches:
            if label_of.setdefault(field, label) != label:
                raise DataError(f"{path}: line {n}: {name} is {label_of[field]} above; remove one")
        unknown += [] if matches else [name]
    warn(f"names in {path} are of no field", unknown)
    return label_of


def name_slides(fields, pattern):
    """{field: its slide, a path without suffix}, {field: its case}; no cases without `pattern`."""
    if not pattern:
        return {field: field.parent / field.stem for field in fields}, {}
    try:
        matches = {field: re.search(pattern, field.as_posix()) for field in fields}
    except re.error as error:
        raise DataError(f"--case {pattern}: no regular expression ({error}); mend it") from None
    case_of = {field: match and match[min(1, match.re.groups)] for field, match in matches.items()}
    if lost := [str(field) for field, case in case_of.items() if not case]:
        raise DataError(f"--case {pattern}: no match in {', '.join(lost)}; give one that fits all")
    number = {case: n for n, case in enumerate(sorted({*case_of.values()}))}
    slide_of, count = {}, Counter()
    for field, case in case_of.items():
        slide_of[field] = field.parent / f"patient_{number[case]:03}_node_{count[case]}"
        count[case] += 1
    return slide_of, case_of


@contextmanager
def opened(path, modes):
    """An image, before it is decoded; DataError where it cannot be read as it is meant."""
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO has previews
                raise DataError(f"{path}: {image.n_frames} pages; save one of them as PNG")
            # Of 16 bits in each colour Pillow keeps the upper 8: black where a camera used 12.
            bits = "16-bit " if ";16" in str(image.tile) else ""
            if image.mode not in modes or bits and image.mode in FIELD_MODES:
                raise DataError(f"{path}: {bits}pixels of type {image.mode}; save as PNG of 8 bits")
            yield image
    except DataError:
        raise
    except Exception as error:  # Pillow raises many types on damaged files
        raise DataError(f"{path}: not a readable image ({error!r}); save it as PNG") from None


def read_field(path):
    """-> the RGB image as a viewer shows it: turned as its EXIF says, on white."""
    with opened(path, FIELD_MODES) as image:
        image = ImageOps.exif_transpose(image).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")


def read_mask(path):
    """-> values (h, w): grey values, numbers in a palette, 0 and 1 of 1-bit files."""
    with opened(path, MASK_MODES) as image:
        values = np.asarray(image).reshape(image.height, image.width, -1)
        if image.mode in ("1", "L") and getattr(image, "tag_v2", {}).get(262) == 0:
            values = ~values  # tifffile writes bool as WhiteIsZero, which Pillow inverts
        if image.mode in ("LA", "RGBA") and (values[..., -1] == 255).all():
            values = values[..., :-1]
    if (values != values[..., :1]).any():
        raise DataError(f"{path}: a mask in colours; save it as one value for each class")
    return values[..., 0]


def look(paths):
    """Decode a field and its mask, or None -> the mask's values; DataError if that cannot be."""
    field, mask = paths
    size = read_field(field).size
    if mask is None:
        return []
    values = read_mask(mask)
    if values.shape != size[::-1]:
        sizes = "{} x {} px and {} x {}".format(*size, *values.shape[::-1])
        raise DataError(f"{field}, {mask}: {sizes}; give a mask of the field's size")
    return [int(value) for value in np.unique(values)]


def tumour_values(values, chosen):
    """{mask: its values} -> those of tumour: `chosen`, else the only one that is not 0."""
    everywhere = {value for of_one in values.values() for value in of_one}
    if chosen:
        if not everywhere & {*chosen}:
            listed = ", ".join(map(str, sorted(everywhere)))
            raise DataError(f"--tumour {chosen}: no mask has these; they have {listed}")
        return chosen
    tumour = set()
    for mask, of_one in values.items():
        before, tumour = tumour, tumour | {*of_one} - {0}
        if len(tumour) > 1:
            listed = ", ".join(map(str, of_one))
            listed += f" (masks before it have {min(before)})" if before else ""
            raise DataError(f"{mask}: its values are {listed}; say which, as in --tumour 1 3")
    return [*tumour]


def pages(image):
    """An RGB image -> itself and its halves, for write_pages."""
    # No level is so small that its rounded size would be taken for that of another one.
    for k in [k for k in range(synthetic.LEVELS) if k == 0 or min(image.size) >> k >= 8]:
        level = image.reduce(2**k)
        # JPEG mixes neighbours: beyond the edge put the edge's colours, not white.
        beyond = [(0, -side % synthetic.TIFF_TILE) for side in (level.height, level.width)]
        blocks = Image.fromarray(np.pad(np.asarray(level), (*beyond, (0, 0)), "edge"))
        yield *level.size, *synthetic.jpeg_tiles(blocks, QUALITY, white=255)


def convert(job):
    """Write a slide and its XML."""
    target, field, mask, label, tumour, mpp = job
    image = read_field(field)
    if mask:
        rings = outline.trace([np.isin(read_mask(mask), tumour)])
        shapes = outline.to_shapes(rings, 1)
    else:
        w, h = image.size
        corners = np.array([(0, 0), (w, 0), (w, h), (0, h)]) - 0.5  # centres are integers
        shapes = [(corners, f"{label} region")]
    target.parent.mkdir(parents=True, exist_ok=True)
    synthetic.write_pages(f"{target}.tif", pages(image), mpp)
    outline.write_annotation(f"{target}.xml", shapes)


def in_parallel(function, jobs, what):
    """function(job) of all jobs, in order. Ctrl-C is for this process, which ends the others."""
    ignore = signal.SIGINT, signal.SIG_IGN
    with ProcessPoolExecutor(initializer=signal.signal, initargs=ignore) as pool:
        return list(data.progress(pool.map(function, jobs), what, len(jobs)))


def write(out, jobs, table):
    """Slides, and `table` as fields.csv where it has rows, into the new folder `out`."""
    part = Path(f"{out}.part{os.getpid()}")  # renamed when complete
    try:
        in_parallel(convert, [(part / slide, *job) for slide, *job in jobs], "writing slides")
        if table:
            names = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
            with open(part / "fields.csv", "w", **names) as file:
                csv.writer(file).writerows([("slide", "field", "case"), *table])
        part.rename(out)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(part, ignore_errors=True)
        raise


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("fields", type=Path, help="folder of images, at any depth")
    parser.add_argument("out", type=Path, help="folder to write, a new one")
    parser.add_argument("--mpp", type=float, required=True, help="um per px of all fields")
    parser.add_argument("--masks", type=Path, help="folder of masks")
    parser.add_argument("--labels", type=Path, help="CSV of name,cancer and name,normal")
    parser.add_argument("--tumour", type=int, nargs="+", help="values of tumour in the masks")
    parser.add_argument("--case", help="regular expression, finds the patient in a field's path")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise DataError(f"{args.out} exists; name a new folder")
    if not 0.05 < args.mpp < 20:
        raise DataError(f"--mpp {args.mpp}: not between 0.05 and 20; give um per px")
    if args.masks and args.fields.resolve().is_relative_to(args.masks.resolve()):
        raise DataError(f"{args.masks}: the fields are in it; give masks a folder of their own")
    masks = images_below(args.masks) if args.masks else []
    places = {(args.masks / mask).resolve() for mask in masks}
    fields = [f for f in images_below(args.fields) if (args.fields / f).resolve() not in places]
    check_names(args.fields, fields)
    slide_of, case_of = name_slides(fields, args.case)
    mask_of = match_masks(args.fields, fields, masks)
    label_of = read_labels(args.labels, fields) if args.labels else {}
    left_out = {*fields} - {*mask_of} - {*label_of}
    warn("fields are left out, they have neither mask nor label", sorted(map(str, left_out)))
    fields = sorted({*fields} - left_out)
    if not fields:
        raise DataError(f"{args.fields}: no field has a mask or a label; give --masks or --labels")

    paths = [(args.fields / f, args.masks / mask_of[f] if f in mask_of else None) for f in fields]
    values = in_parallel(look, paths, "reading fields")
    values_of = {mask: v for (_, mask), v in zip(paths, values) if mask}
    tumour = tumour_values(values_of, args.tumour)
    jobs = []
    for field, (path, mask) in zip(fields, paths):
        label, has_tumour = label_of.get(field), bool({*values_of.get(mask, ())} & {*tumour})
        if mask and label and has_tumour != (label == "cancer"):
            finding = f"labelled {label}, but its mask has {'' if has_tumour else 'no '}tumour"
            raise DataError(f"{path}: {finding}; correct the label, or the mask {mask}")
        jobs.append((slide_of[field], path, mask, label, tumour, args.mpp))
    write(args.out, jobs, [(f"{slide_of[f]}.tif", f, case_of[f]) for f in fields if case_of])
    unmasked = Counter(label for _, _, mask, label, _, _ in jobs if not mask)
    kinds = f"{len(values_of)} outlined, {unmasked['cancer']} cancer, {unmasked['normal']} normal"
    print(f"{len(jobs)} slides are in {args.out}: {kinds}; to train on them: docs/files.md, Images")


if __name__ == "__main__":
    main()
