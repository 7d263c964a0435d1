"""The content of a page of the viewer."""

import base64
import json
import re

import numpy as np

from tests.support.checks import present


def read_viewer(path):
    """The figure that a page gives to plotly: {"data": [...], "layout": {...}}."""
    text = path.read_text()
    start = present(re.search(r'Plotly\.newPlot\(\s*"[^"]+",\s*', text)).end()
    data, end = json.JSONDecoder().raw_decode(text, start)
    layout, _ = json.JSONDecoder().raw_decode(text, present(re.compile(r",\s*").match(text, end)).end())
    return {"data": data, "layout": layout}


def decode(array) -> np.ndarray:
    return np.frombuffer(base64.b64decode(array["bdata"]), array["dtype"])
