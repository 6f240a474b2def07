"""QuPath's GeoJSON: written for a prediction, and turned into ASAP's XML for training.

    python -m extras.geojson exported/*.geojson      # NAME.geojson -> NAME.xml beside it

Pixel (0, 0) of level 0 spans 0 to 1 in QuPath; in the XML its centre is at 0.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from extras import outline
from slide import DataError, warn

TUMOUR = "tumor", "tumour", "metastasis", "metastases"
EXCLUSION = "ignore*", "ignore", "normal", "exclusion"


def write(path, rings, downsample):
    """[Ring] at 1 / `downsample` -> a FeatureCollection: a Polygon with its holes per lesion."""
    lesions = defaultdict(list)
    for n, ring in enumerate(rings):
        xy = np.concatenate([ring.xy, ring.xy[:1]]) * downsample
        lesions[ring.parent if ring.is_hole else n].append(xy.tolist())  # the outer ring is first
    kind = {"objectType": "annotation", "classification": {"name": "Tumor"}, "predicted": True}
    shapes = [{"type": "Polygon", "coordinates": lesion} for lesion in lesions.values()]
    features = [{"type": "Feature", "properties": kind, "geometry": shape} for shape in shapes]
    Path(path).write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def read(path):
    """GeoJSON -> [(xy, kind)]; DataError where a feature is no area of a known class."""
    shapes = []
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        features = content if isinstance(content, list) else content.get("features", [content])
        for feature in features:
            about, kind = feature["properties"], feature["geometry"]["type"]
            name = str((about.get("classification") or {}).get("name"))
            base = name.lower().split(":")[0].strip()  # without a subclass, as in Tumor: Positive
            what = about.get("objectType", "annotation")
            if what != "annotation" or "Polygon" not in kind or base not in TUMOUR + EXCLUSION:
                raise ValueError(f"{what} {kind} of class {name} is no area of tumour or to ignore")
            parts = feature["geometry"]["coordinates"]
            for part in [parts] if kind == "Polygon" else parts:
                # One ring with detours to its holes: exclusions would clear lesions in them too.
                outer, *holes = map(clockwise, part)
                ring = outline.around(outer, holes) - 0.5
                shapes.append((ring, "tumour" if base in TUMOUR else "exclusion"))
        if any(feature["properties"].get("predicted") for feature in features):  # not by QuPath
            warn(f"{path}: as predicted; look at it in QuPath before you train on it")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: {error}; mend it in QuPath, export it again") from None
    return shapes


def clockwise(ring):
    """A ring of GeoJSON, in any direction -> its corners (n, 2), clockwise."""
    xy = np.array([point[:2] for point in ring], float)
    x, y = (xy - xy[0]).T
    area = x @ np.roll(y, -1) - y @ np.roll(x, -1)
    if not 0 < abs(area) < np.inf:  # False for nan too
        raise ValueError("a ring without area, or of points that are no finite pixels")
    return xy if area > 0 else xy[::-1]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="exports of QuPath")
    parser.add_argument("--overwrite", action="store_true", help="replace an XML that is there")
    args = parser.parse_args(argv)
    for path in args.files:
        shapes, xml = read(path), path.with_suffix(".xml")
        if xml.exists() and not args.overwrite:
            raise DataError(f"{xml}: is there already; move it, or give --overwrite")
        outline.write_annotation(xml, shapes)
        print(
            f"{xml}: {len(shapes)} polygons, {sum(k == 'tumour' for _, k in shapes)} of them tumour"
        )


if __name__ == "__main__":
    main()
