"""Contrastive losses and the rule that makes each of them exact over processes."""

from accel_clip.losses import clip as clip
from accel_clip.losses import coca as coca
from accel_clip.losses import distill as distill
from accel_clip.losses import siglip as siglip
