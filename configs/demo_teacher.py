"""The demo's teacher: a small ViT trained on generated streets without semantic labels.

    python -m scalr_jax.main --config=configs/demo_teacher.py --workdir=runs/demo_teacher
    cp runs/demo_teacher/demo_teacher.safetensors scalr_jax/assets

Targets are depth, normals, height, colour and the extent and centre of objects (`scalr_jax/demo/teacher.py`); their
weights and the ViT's size are `config.teacher_training`.

2026-11-22, on 2 cores shared with other work (load 4 to 7): 257 s to render 1,500 images of 500 streets, 1,008 s for
1,500 steps of 8 images (0.43 s a step while the load was 4). Means over the last 500 steps: loss 5.64; cross-entropies
length 1.40, width 1.51, tallness 1.32, height 1.15, depth 1.85 nats; Huber losses normal 0.21, albedo 0.24.

A linear classifier on unit features at the points' pixels (160 training streets, 32 beams, tokens sampled as in
distillation), on 60 validation streets: 0.570 mIoU (road 0.89, pavement 0.66, terrain 0.63, building 0.76, fence 0.45,
vegetation 0.75, trunk 0.36, pole 0.22, person 0.34, car 0.62, van 0.55, bus 0.62). The same classifier on a ViT of
this width, 6 blocks deep, with random weights: 0.230; on the 8 x 8 pixels around the point and its place in the image:
0.344. What is thinner than a patch of 8 pixels is what it misses. These labels served to measure and never to train.
"""

from scalr_jax import config as defaults


def get_config():
    config = defaults.get_config()
    config.task = "teacher"
    config.num_steps = 1500
    config.log_every_steps = 25
    config.data.update(dataset="streets", image_size=(112, 224), num_scenes=500)
    config.optimizer.update(
        learning_rate=3e-3, final_learning_rate=1e-5, weight_decay=0.03, beta2=0.99, warmup_share=0.05
    )
    config.optimizer.batch_size = 8
    return config
