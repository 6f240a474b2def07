"""QuPath's GeoJSON: written for a prediction, and turned into ASAP's XML for training.

    python -m extras.geojson exported/*.geojson      # NAME.geojson -> NAME.xml beside it

Pixel (0, 0) of level 0 spans 0 to 1 in QuPath; in the XML its centre is at 0: .5 is subtracted.
Tumor, Tumour, Metastasis, Metastases are tumour; Ignore*, Normal, Exclusion are cut out; in any
case, and with a subclass (Tumor: Positive).
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

import data
from extras import outline

TUMOUR = "tumor", "tumour", "metastasis", "metastases"
EXCLUSION = "ignore", "normal", "exclusion"


def write(path, rings, downsample):
    """[Ring] at 1 / `downsample` -> a FeatureCollection: a Polygon with its holes per lesion."""
    shapes = defaultdict(list)
    for n, ring in enumerate(rings):
        xy = np.concatenate([ring.xy, ring.xy[:1]]) * downsample
        shapes[ring.parent if ring.is_hole else n].append(xy.tolist())  # the lesion comes first
    kind = {"objectType": "annotation", "classification": {"name": "Tumor"}, "predicted": True}
    kind = {"type": "Feature", "properties": kind}  # QuPath does not export "predicted"
    shapes = [{"type": "Polygon", "coordinates": shape} for shape in shapes.values()]
    content = {"type": "FeatureCollection", "features": [kind | {"geometry": s} for s in shapes]}
    Path(path).write_text(json.dumps(content))


def read(path):
    """A FeatureCollection, a Feature or a list of them -> [(xy, is_tumour)]; else DataError."""
    polygons = []
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        features = content if isinstance(content, list) else content.get("features", [content])
        for feature in features:
            name, shape = feature["properties"].get("classification"), feature["geometry"]
            name = str(name["name"] if isinstance(name, dict) else name)
            base = name.lower().split(":")[0].strip(" *")
            is_tumour = base in TUMOUR
            if feature["properties"].get("objectType", "annotation") != "annotation":
                raise ValueError("it has detections or cells; export the annotations alone")
            kind, parts = shape["type"], shape["coordinates"]
            if not kind.endswith("Polygon") or not (is_tumour or base in EXCLUSION):
                raise ValueError(f"a {kind} of class {name} is no area of tumour or to be ignored")
            for outer, *holes in [parts] if kind == "Polygon" else parts:
                # One ring with detours to its holes: exclusions would clear lesions in them too.
                xy = outline.around(clockwise(outer), [clockwise(hole) for hole in holes])
                polygons.append((xy - 0.5, is_tumour))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise data.DataError(f"{path}: {error}; mend it in QuPath, export it again") from None
    return polygons


def clockwise(ring):
    """A ring of GeoJSON, in any direction -> its corners (n, 2), clockwise, the first once."""
    xy = np.array([p[:2] for p in (ring[:-1] if ring[0] == ring[-1] else ring)], float)
    if len(xy) < 3 or not (np.abs(xy) < 1e7).all():  # False for nan too
        raise ValueError("a ring of fewer than 3 points, or of points that are no finite pixels")
    x, y = (xy - xy[0]).T
    return xy if x @ np.roll(y, -1) >= y @ np.roll(x, -1) else xy[::-1]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="exports of QuPath")
    parser.add_argument("--overwrite", action="store_true", help="replace an XML that is there")
    args = parser.parse_args(argv)
    for path in args.files:
        polygons, xml = read(path), path.with_suffix(".xml")
        if '"predicted": true' in path.read_text(encoding="utf-8-sig"):
            data.warn(f"{path}: as predicted; look at it in QuPath before you train on it")
        if xml.exists() and not args.overwrite:
            raise data.DataError(f"{xml}: is there already; move it, or give --overwrite")
        outline.write_annotation(xml, polygons)
        print(f"{xml}: {len(polygons)} polygons, {sum(t for _, t in polygons)} of them tumour")


if __name__ == "__main__":
    main()
