//! Cards of NVIDIA as a home for a model.

#[cfg(test)]
mod emulator;
#[cfg(test)]
mod kernels;
#[cfg(test)]
mod nvrtc;
