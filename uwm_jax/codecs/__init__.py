"""Image codecs: what turns frames into the latents that the model predicts, and back.

Three of them share one interface (`latent_shape`, `encode`, `decode`) and keep their arrays outside, so that
the arrays travel with the checkpoint and never become constants of a compiled step:

- `VAECodec`: a frozen `AutoencoderKL` (UWM, arXiv:2504.02792, uses SDXL's);
- `PixelsCodec`: the pixels themselves;
- `PCACodec`: a linear autoencoder of patches, fitted in seconds by `fit_pca`.

Frames are (B, V, T, H, W, 3) float32 in [0, 1], latents (B, V, T, h, w, C) float32 with most values in
[-1, 1] (VAE, pixels) or of unit standard deviation (PCA). Decoded frames are float32 and not clipped.
"""

from uwm_jax.codecs.pca import PCACodec, fit_pca
from uwm_jax.codecs.pixels import PixelsCodec
from uwm_jax.codecs.vae import VAECodec

Codec = VAECodec | PixelsCodec | PCACodec

__all__ = ["Codec", "PCACodec", "PixelsCodec", "VAECodec", "fit_pca"]
