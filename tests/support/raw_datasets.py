"""Tiny datasets in the raw layouts of PandaSet, SemanticKITTI and nuScenes, written by the tests themselves."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

PANDASET_LENS = {"fx": 900.0, "fy": 900.0, "cx": 950.0, "cy": 530.0}
KITTI_P2 = np.array([[700.0, 0, 600, 45], [0, 700, 180, -0.3], [0, 0, 1, 0.005]])
KITTI_TR = np.array([[0.0, -1, 0, 0], [0, 0, -1, -0.06], [1, 0, 0, -0.3]])


def global_name(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def plain(value: object, protocol: int = 3) -> bytes:
    """The opcodes that push a plain value: its pickle without header and STOP."""
    return pickle.dumps(value, protocol)[2:-1]


def array_opcodes(array: np.ndarray, core: str = "core", *, data: object = None) -> bytes:
    """The opcodes of a NumPy array, as NumPy 1 and 2 write them in protocol 3."""
    code = array.dtype.str[1:]
    order = array.dtype.str[0]
    dtype = global_name("numpy", "dtype") + plain((code, 0, 1)) + b"R"
    dtype += plain((3, order, None, None, None, -1, -1, 0)) + b"b"
    head = global_name(f"numpy.{core}.multiarray", "_reconstruct")
    head += b"(" + global_name("numpy", "ndarray") + plain((0,)) + plain(b"b") + b"tR"
    content = array.tobytes() if data is None else data
    return head + b"(" + plain(1) + plain(array.shape) + dtype + plain(False) + plain(content) + b"tb"


def table_pickle(columns: dict[str, np.ndarray], core: str = "core") -> bytes:
    """A pickled DataFrame as pandas before 1.3 writes it (PandaSet's files), without pandas."""
    names = np.empty(len(columns), object)
    index = global_name("pandas.core.indexes.base", "_new_Index")
    index += b"(" + global_name("pandas.core.indexes.base", "Index")
    index += (
        b"(" + plain("data") + array_opcodes(names, core, data=list(columns)) + plain("name") + plain(None) + b"dtR"
    )
    blocks = b"("
    for dtype in dict.fromkeys(array.dtype for array in columns.values()):
        places = [i for i, array in enumerate(columns.values()) if array.dtype == dtype]
        values = np.stack([array for array in columns.values() if array.dtype == dtype])
        blocks += b"(" + plain("values") + array_opcodes(values, core)
        blocks += plain("mgr_locs") + array_opcodes(np.array(places), core) + b"d"
    layout = b"(" + plain("axes") + b"(" + index + b"l" + plain("blocks") + blocks + b"ld"
    state = b"(" + plain([]) + plain([]) + plain([]) + b"(" + plain("0.14.1") + layout + b"dt"
    manager = global_name("pandas.core.internals.managers", "BlockManager") + b")\x81" + state + b"b"
    frame = global_name("pandas.core.frame", "DataFrame") + b")\x81(" + plain("_data") + manager + b"db"
    return b"\x80\x03" + frame + b"."


def points_ahead(num_points: int, seed: int = 0) -> np.ndarray:
    """Points [N, 4] float32 before a car that looks along x: 5 to 40 m ahead, metres and raw intensity."""
    rng = np.random.default_rng(seed)
    low, high = (5.0, -2.0, -1.0, 0.0), (40.0, 2.0, 1.0, 100.0)
    return rng.uniform(low, high, (num_points, 4)).astype(np.float32)


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_image(path: Path, size: tuple[int, int], shade: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path)


def write_gzip(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, 1))


def pandaset_pose(number: int, heading: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0)) -> dict:
    """Frame number n stands at x = 10 n metres."""
    return {"position": {"x": 10.0 * number, "y": 1.0, "z": 2.0}, "heading": dict(zip("wxyz", heading, strict=True))}


def write_pandaset(
    root: Path,
    scene: str = "001",
    *,
    numbers: tuple[int, ...] = (2, 5),
    latitude: float = 37.7,
    cameras: tuple[str, ...] = ("front_camera",),
) -> None:
    """Frames `numbers` of one scene. Cameras look along x from where the lidar is; 60 Pandar64, 40 PandarGT points."""
    folder = root / scene
    looking_along_x = (0.5, -0.5, 0.5, -0.5)
    poses = [pandaset_pose(number) for number in range(max(numbers) + 1)]
    write_json(folder / "lidar" / "poses.json", poses)
    write_json(folder / "meta" / "gps.json", [{"lat": latitude, "long": -122.4}])
    for camera in cameras:
        write_json(folder / "camera" / camera / "intrinsics.json", PANDASET_LENS)
        camera_poses = [pandaset_pose(number, looking_along_x) for number in range(len(poses))]
        write_json(folder / "camera" / camera / "poses.json", camera_poses)
    for number in numbers:
        points = points_ahead(100, seed=number) + np.array([10.0 * number, 1.0, 2.0, 0.0])
        table = dict(zip("xyzi", points.T, strict=True)) | {
            "t": points[:, 0],
            "d": (np.arange(100) % 5 > 2).astype(int),
        }
        write_gzip(folder / "lidar" / f"{number:02d}.pkl.gz", table_pickle(table))
        labels = {"class": np.arange(100) % 43}
        write_gzip(folder / "annotations" / "semseg" / f"{number:02d}.pkl.gz", table_pickle(labels))
        for camera in cameras:
            write_image(folder / "camera" / camera / f"{number:02d}.jpg", (1920, 1080), 10 * number)


def write_semantic_kitti(root: Path, sequence: str = "00", *, apart: bool = False, num_scans: int = 2) -> None:
    """Scans of one sequence with images and labels; calib.txt beside them, or `apart` below calib/."""
    folder = root / "dataset" / "sequences" / sequence
    calib = (root / "calib" / "dataset" / "sequences" / sequence if apart else folder) / "calib.txt"
    calib.parent.mkdir(parents=True, exist_ok=True)
    rows = {"P2": KITTI_P2, "Tr": KITTI_TR}
    calib.write_text("".join(f"{key}: {' '.join(map(str, rows[key].ravel()))}\n" for key in rows))
    for number in range(num_scans):
        points = points_ahead(50, seed=number)
        for kind, content in (
            ("velodyne/{}.bin", points.tobytes()),
            ("labels/{}.label", ((7 << 16) + np.resize([0, 10, 40, 252, 81], 50)).astype("<u4").tobytes()),
        ):
            path = folder / kind.format(f"{number:06d}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        write_image(folder / "image_2" / f"{number:06d}.png", (1210, 365))


def write_nuscenes(root: Path, *, scenes: tuple[str, ...] = ("scene-0061", "scene-0103")) -> None:
    """One keyframe a scene: LIDAR_TOP and CAM_FRONT (the car moves 1 m between them), lidarseg, and one sweep."""
    tables: dict[str, list] = {name: [] for name in ("scene", "sample", "sample_data", "ego_pose", "lidarseg")}
    tables["sensor"] = [{"token": channel, "channel": channel} for channel in ("LIDAR_TOP", "CAM_FRONT")]
    pose = {"rotation": [1.0, 0.0, 0.0, 0.0], "translation": [0.0, 0.0, 1.5]}
    lens = [[700.0, 0.0, 400.0], [0.0, 700.0, 220.0], [0.0, 0.0, 1.0]]
    tables["calibrated_sensor"] = [
        pose | {"token": "c-LIDAR_TOP", "sensor_token": "LIDAR_TOP", "camera_intrinsic": []},
        pose
        | {"token": "c-CAM_FRONT", "sensor_token": "CAM_FRONT", "camera_intrinsic": lens}
        | {"rotation": [0.5, -0.5, 0.5, -0.5]},
    ]
    tables["category"] = [{"name": "noise", "index": 0}, {"name": "vehicle.car", "index": 17}]
    for i, scene in enumerate(scenes):
        tables["scene"].append({"token": f"t-{scene}", "name": scene})
        tables["sample"].append({"token": f"s-{scene}", "scene_token": f"t-{scene}", "timestamp": 1000 + i})
        for channel, x in (("LIDAR_TOP", 600.0), ("CAM_FRONT", 601.0), ("sweep", 602.0)):
            tables["ego_pose"].append({"token": f"e-{scene}-{channel}", **pose, "translation": [x, 1600.0, 0.0]})
            sensor = "LIDAR_TOP" if channel == "sweep" else channel
            file = f"samples/{channel}/{scene}.{'jpg' if channel == 'CAM_FRONT' else 'pcd.bin'}"
            tables["sample_data"].append(
                {"token": f"d-{scene}-{channel}", "sample_token": f"s-{scene}", "is_key_frame": channel != "sweep"}
                | {"ego_pose_token": f"e-{scene}-{channel}", "calibrated_sensor_token": f"c-{sensor}"}
                | {"filename": file, "width": 800, "height": 450}
            )
        labels = f"lidarseg/v1.0-mini/{scene}.bin"
        tables["lidarseg"].append({"sample_data_token": f"d-{scene}-LIDAR_TOP", "filename": labels})
        rows = np.column_stack([points_ahead(50, seed=i), np.zeros(50)]).astype(np.float32)
        for file, content in (
            (f"samples/LIDAR_TOP/{scene}.pcd.bin", rows.tobytes()),
            (labels, np.resize(np.array([0, 17], np.uint8), 50).tobytes()),
        ):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(content)
        write_image(root / f"samples/CAM_FRONT/{scene}.jpg", (800, 450))
    for name, table in tables.items():
        write_json(root / "v1.0-mini" / f"{name}.json", table)


FOLDER_CAMERA: dict = {  # looks along x of the lidar, from 0.5 m ahead of it and 0.2 m above
    "size": [400, 200],
    "intrinsics": [[210.0, 0.0, 201.0], [0.0, 205.0, 99.0], [0.0, 0.0, 1.0]],
    "lidar_to_camera": [[0.0, -1, 0, 0], [0, 0, -1, 0.2], [1, 0, 0, -0.5], [0, 0, 0, 1]],
}


def write_folder(root: Path, scenes: tuple[str, ...] = ("a", "b"), *, num_scans: int = 2, **settings: object) -> None:
    """Scans of 4 columns, images of the camera "front", labels 0 and 1 in turn; `settings` go into dataset.json."""
    write_json(root / "dataset.json", {"cameras": {"front": FOLDER_CAMERA}, **settings})
    for s, scene in enumerate(scenes):
        for number in range(num_scans):
            points, stem = points_ahead(200, seed=10 * s + number), f"{number:03d}"
            for path, content in (
                (root / scene / "scans" / f"{stem}.bin", points.tobytes()),
                (root / scene / "labels" / f"{stem}.label", np.resize([0, 1], 200).astype("<u4").tobytes()),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            write_image(root / scene / "front" / f"{stem}.png", (400, 200), 40 * number + 20)


def rewrite_settings(root: Path, **changes: object) -> None:
    """Changes keys of dataset.json; None removes one."""
    path = root / "dataset.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def change_camera(root: Path, **changes: object) -> None:
    """Changes keys of the camera "front"; None removes one."""
    camera = FOLDER_CAMERA | changes
    rewrite_settings(root, cameras={"front": {key: value for key, value in camera.items() if value is not None}})
