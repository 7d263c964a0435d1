"""The picture of all corruptions of one frame."""

import corruption_pictures
import numpy as np
import pytest
from PIL import Image


@pytest.mark.slow
def test_a_street(street_cache, tmp_path, capsys):
    output = tmp_path / "corruptions.png"
    arguments = [f"--root={street_cache}", f"--output={output}", "--severity=light"]
    corruption_pictures.main(arguments)
    picture = np.asarray(Image.open(output).convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
    with pytest.raises(SystemExit) as stopped:
        corruption_pictures.main([*arguments, "--severity=mild"])
    assert stopped.value.code == 2
    assert "mild" in capsys.readouterr().err
