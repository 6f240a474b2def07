"""Annotations of QuPath and Aperio ImageScope, turned into ASAP's XML for training.

    python -m extras.convert new/*.geojson                  # QuPath: NAME.xml beside NAME.geojson
    python -m extras.convert aperio/*.xml --out new         # ImageScope: new/NAME.xml
    python -m extras.convert aperio/*.xml --out new --layer 1=tumor 2="normal region"

QuPath's classes, and the names of ImageScope's layers where --layer has no class for them, are
(in any case, with or without a *): Tumor, Tumour, Metastasis, Metastases; Ignore, Normal,
Exclusion, which are cut out of the tumour; Region, ROI, inside which all tumour is outlined;
Cancer region and Normal region, image-level labels. Anything else is refused.

Pixel (0, 0) of level 0 spans 0 to 1 in QuPath; in the XML its centre is at 0.
"""

import argparse
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from extras import outline
from slide import DataError, warn

KINDS = dict.fromkeys(("tumor", "tumour", "metastasis", "metastases"), "tumour")
KINDS |= dict.fromkeys(("ignore", "normal", "exclusion"), "exclusion")
KINDS |= {"region": "roi", "roi": "roi"}
KINDS |= {name: name for name in ("cancer region", "normal region")}
# Types of ImageScope's regions, and those that are areas.
TYPES = {"0": "polygon", "1": "rectangle", "2": "ellipse", "3": "arrow", "4": "ruler", "5": "point"}
AREAS = "polygon", "rectangle", "ellipse"
UNREADABLE = OSError, ElementTree.ParseError, RecursionError, ValueError, LookupError
UNREADABLE += TypeError, AttributeError, OverflowError


def write(path, rings, downsample):
    """[outline.Ring] at 1 / `downsample` -> GeoJSON for QuPath: a Polygon with holes per lesion."""
    lesions = defaultdict(list)
    for n, ring in enumerate(rings):
        xy = np.concatenate([ring.xy, ring.xy[:1]]) * downsample
        lesions[ring.parent if ring.is_hole else n].append(xy.tolist())  # the outer ring is first
    tumour = {"name": "Tumor", "color": [200, 0, 0]}  # QuPath reads no class without a colour
    about = {"objectType": "annotation", "classification": tumour, "predicted": True}
    shapes = [{"type": "Polygon", "coordinates": lesion} for lesion in lesions.values()]
    features = [{"type": "Feature", "properties": about, "geometry": shape} for shape in shapes]
    Path(path).write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def kind_of(name):
    """The kind of a class, of which Tumor: Positive is a part; None for an unknown one."""
    return KINDS.get(name.split(":")[0].strip("* ").lower())


def read_geojson(path):
    """QuPath's export -> [(kind, [outer ring, *holes])]; ValueError where it has anything else."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    features = content if isinstance(content, list) else content.get("features", [content])
    polygons, predicted, empty, todo = [], False, [], features[::-1]
    while todo:
        feature = todo.pop()
        about, geometry = feature["properties"], feature["geometry"] or {}
        todo += (about.get("childObjects") or [])[::-1]
        predicted |= bool(about.get("predicted"))
        name = class_name(about.get("classification"))
        kind, shape = kind_of(name), str(geometry.get("type"))
        # The id was the type of an object until QuPath 0.2; it is a random number since 0.4.
        what = str(feature.get("id")).removeprefix("Path").lower()
        what = what.removesuffix("object") if what.endswith("object") else "annotation"
        what = about.get("objectType") or about.get("object_type") or what
        if what != "annotation" or "Polygon" not in shape or kind is None:
            raise ValueError(
                f"{what} {shape} of class {name} is no outline of tumour, exclusion or region"
            )
        plane = geometry.get("plane") or {}
        if plane.get("z") or plane.get("t"):
            raise ValueError(f"{name} on plane z {plane.get('z')}, t {plane.get('t')}, not on 0, 0")
        parts = geometry["coordinates"]
        for part in [parts] if shape == "Polygon" else parts or [()]:
            rings = [ring_of(points) for points in part or [()]]
            empty += [] if len(rings[0]) else [name]  # QuPath keeps what was taken away in full
            if len(rings[0]):
                polygons.append((kind, [ring for ring in rings if len(ring)]))
    warn(f"{path}: skipped polygons without area, of class", empty)
    if predicted:
        warn(f"{path}: as predicted; look at it in QuPath before you train on it")
    return polygons


def class_name(node):
    """A classification as any version of QuPath writes it -> its name, or that of its parent."""
    while isinstance(node, dict) and node.get("parentClass"):  # up to 0.3
        node = node["parentClass"]
    if isinstance(node, dict):  # "names" since 0.4, of which the first is the parent
        node = ": ".join(node.get("names") or [str(node.get("name"))])
    return str(node)


def ring_of(points):
    """Corners, pixel (0, 0) from 0 to 1 -> (n, 2) clockwise, centre at 0; (0, 2) without area."""
    xy = np.array([point[:2] for point in points], float).reshape(-1, 2) - 0.5
    if not (np.abs(xy) < 1e7).all():  # False for nan too
        raise ValueError("points that are no finite pixels")
    if len(xy) < 3 or np.linalg.matrix_rank(xy - xy[0]) < 2:
        return xy[:0]
    x, y = (xy - xy[:1]).T
    return xy if x @ np.roll(y, -1) >= y @ np.roll(x, -1) else xy[::-1]


def read_imagescope(path, classes):
    """ImageScope's XML -> [(xy, kind)]; `classes`: {Id or name of a layer: class} of --layer."""
    root, shapes, skipped = ElementTree.parse(path).getroot(), [], Counter()
    unused, tumour_layers, negatives = set(classes), set(), 0
    if root.tag != "Annotations":
        raise ValueError(f"its root is {root.tag}, not Annotations as in ImageScope")
    for layer in root.iter("Annotation"):
        number, name = layer.get("Id", ""), layer.get("Name", "")
        kind = kind_of(classes.get(number, classes.get(name, name)))
        unused -= {number, name}
        for region in layer.iterfind("Regions/Region"):
            about = f"region {region.get('Id')} of layer {number} {name!r}"
            what = TYPES.get(region.get("Type", "0"))
            if what is None:
                raise ValueError(f"{about} has type {region.get('Type')}, which is unknown")
            vertices = region.iterfind("Vertices/Vertex")
            xy = np.array([(v.get("X"), v.get("Y")) for v in vertices], float).reshape(-1, 2)
            xy = ring_of(corners(what, xy) if what in AREAS and len(xy) > 1 else ())
            if not len(xy):
                skipped[what] += 1
                continue
            if kind is None:
                raise DataError(f"{path}: {about} has no class; give --layer {number}=tumor")
            negative = {"0": False, "1": True}[region.get("NegativeROA", "0")]
            if negative and kind != "tumour":
                raise ValueError(f"{about} is negative, which only regions of tumour can be")
            negatives += negative
            tumour_layers |= {number} if kind == "tumour" else set()
            # The centre of pixel (0, 0) is taken to be at .5, as in QuPath: Aperio does not say.
            shapes.append((xy, "exclusion" if negative else kind))
    if skipped:
        listed = ", ".join(f"{count} {what}" for what, count in skipped.items())
        warn(f"{path}: skipped {listed}, without area")
    if negatives and len(tumour_layers) > 1:
        warn(f"{path}: negative regions, which are cut out of the tumour of all its layers")
    if unused:
        warn(f"{path}: has no layer {', '.join(sorted(unused))}")
    return shapes


def corners(what, xy):
    """Vertices (n, 2) of a region of ImageScope -> those of its outline.

    Rectangles have four, or two opposite ones. Ellipses have two, opposite corners of the box
    around them; their outline has as many as keep it within .05 px.
    """
    if what == "polygon" or what == "rectangle" and len(xy) > 2:
        return xy
    if len(xy) > 2:
        raise ValueError(f"an ellipse of {len(xy)} points instead of 2 corners")
    centre, radii = xy.mean(0), np.ptp(xy, axis=0) / 2
    if what == "rectangle":
        return centre + radii * [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    angle = np.linspace(0, 2 * np.pi, 16 + int(10 * radii.max() ** 0.5))
    return centre + radii * np.stack([np.cos(angle), np.sin(angle)], 1)


def convert(path, classes):
    """A file of QuPath or ImageScope -> [(xy, kind)]; DataError where it cannot be used in full."""
    try:
        if path.suffix.lower() == ".xml":
            shapes = read_imagescope(path, classes)
        else:
            shapes = outline.cut_holes(read_geojson(path))
    except UNREADABLE as error:
        raise DataError(f"{path}: not a usable export ({error}); mend it, export again") from None
    if all(kind == "exclusion" for _, kind in shapes):
        what = "refuse holes alone" if shapes else "take the slide for normal"
        warn(f"{path}: no tumour and no region, so training will {what}")
    return shapes


def layer_class(text):
    """LAYER=CLASS -> its two parts."""
    layer, _, name = text.rpartition("=")
    if not layer or kind_of(name) is None:
        raise argparse.ArgumentTypeError(f"{text} is no LAYER=CLASS, as in 1=tumor")
    return layer, name


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="GeoJSON of QuPath, XML of ImageScope")
    add("--out", type=Path, help="folder of the XML (beside each FILE)")
    layers = {"nargs": "+", "action": "extend", "type": layer_class, "default": []}
    advice = "class of ImageScope's layer of that Id or name; after FILE"
    add("--layer", **layers, metavar="LAYER=CLASS", help=advice)
    add("--overwrite", action="store_true", help="replace an XML that is there, but no FILE")
    args = parser.parse_args(argv)
    pairs = [(path, (args.out or path.parent) / f"{path.stem}.xml") for path in args.files]
    sources = {path.resolve() for path, _ in pairs}
    targets = Counter(xml.resolve() for _, xml in pairs)
    if args.out and args.out.exists() and not args.out.is_dir():
        raise DataError(f"{args.out}: is a file; give --out FOLDER")
    for path, xml in pairs:
        if xml.resolve() in sources or xml.exists() and path.exists() and xml.samefile(path):
            raise DataError(f"{xml}: is read, so it cannot be written; give --out FOLDER")
        if targets[xml.resolve()] > 1:
            raise DataError(f"{xml}: of {targets[xml.resolve()]} files; convert one of them")
    for path, xml in pairs:
        shapes = convert(path, dict(args.layer))
        if xml.exists() and not args.overwrite:
            raise DataError(f"{xml}: is there already; move it, or give --overwrite")
        xml.parent.mkdir(parents=True, exist_ok=True)
        outline.write_annotation(xml, shapes)
        counts = Counter(kind for _, kind in shapes)
        print(f"{xml}: {', '.join(f'{n} {kind}' for kind, n in counts.items()) or 'no outlines'}")


if __name__ == "__main__":
    main()
