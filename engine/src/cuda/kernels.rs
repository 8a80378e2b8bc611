//! The kernels of the CUDA home: what each does, what it is given, and over which grid.
//!
//! A kernel is an entry point of a file in `kernels/`, compiled with some defines. Its one parameter is a structure of words of eight
//! bytes in the order of the fields here: an address, or a `u32` or `f32` in the low bytes. So a launch is a [`Call`]: a kernel, a grid,
//! and an array of words; nothing is allocated to make one. The grid is a function of the shape alone.
//!
//! Every kernel gives a row the same bits whatever the other rows, how many they are, and which variant computes it. `linear.cu`,
//! `attention.cu` and `latent_attention.cu` say how; the tests run them on the processor ([`super::emulator`]) and compare bits.
//!
//! Buffers begin at multiples of 256 bytes, and rows of 16-bit floats at multiples of 16. Strides count elements.

mod codes;
mod copies;
mod deltas;
mod draw;
mod experts;
mod latent;
mod linear;
mod pages;
mod products;
mod rows;

pub(crate) use codes::Codes;
pub(crate) use copies::Copies;
pub(crate) use deltas::{DeltaOf, Deltas, Shrink};
pub(crate) use draw::Draw;
pub(crate) use experts::{Choose, Cut, Group, Mix, Pairs};
pub(crate) use latent::{LatentAttention, LatentKeys, LatentQueries};
pub(crate) use linear::{Finish, Linear, LinearShape};
pub(crate) use pages::{Attention, HeadNorms, Pages, Rotary, Share};
pub(crate) use products::{Narrow, Sums};
pub(crate) use rows::{Cap, Check, Embed, Gather, Join, JoinTo, Largest, Norm, NormTo, Reorder, Table};

/// A file of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    Rows,
    Draw,
    Linear,
    Codes,
    Products,
    Shrink,
    Experts,
    Rotary,
    Attention,
    Latent,
    LatentAttention,
    Copies,
}

impl Source {
    /// Returns the names and texts of what it is made of.
    fn files(self) -> &'static [(&'static str, &'static str)] {
        const DELTAS: (&str, &str) = ("deltas.cu", include_str!("kernels/deltas.cu"));
        const LINEAR: (&str, &str) = ("linear.cu", include_str!("kernels/linear.cu"));
        const PAGES: (&str, &str) = ("pages.cu", include_str!("kernels/pages.cu"));
        const BLOCKS: (&str, &str) = ("blocks.cu", include_str!("kernels/blocks.cu"));
        match self {
            Source::Rows => &[("rows.cu", include_str!("kernels/rows.cu"))],
            Source::Draw => &[("draw.cu", include_str!("kernels/draw.cu"))],
            Source::Linear => &[DELTAS, LINEAR],
            Source::Codes => &[DELTAS, LINEAR, ("codes.cu", include_str!("kernels/codes.cu"))],
            Source::Products => &[DELTAS, LINEAR, ("products.cu", include_str!("kernels/products.cu"))],
            Source::Shrink => &[DELTAS, ("shrink.cu", include_str!("kernels/shrink.cu"))],
            Source::Copies => &[("copies.cu", include_str!("kernels/copies.cu"))],
            Source::Experts => &[("experts.cu", include_str!("kernels/experts.cu"))],
            Source::Rotary => &[PAGES, ("rotary.cu", include_str!("kernels/rotary.cu"))],
            Source::Attention => &[PAGES, BLOCKS, ("attention.cu", include_str!("kernels/attention.cu"))],
            Source::Latent => &[PAGES, ("latent.cu", include_str!("kernels/latent.cu"))],
            Source::LatentAttention => {
                &[PAGES, BLOCKS, ("latent_attention.cu", include_str!("kernels/latent_attention.cu"))]
            }
        }
    }
}

/// The 16-bit floats that weights are, and what meets them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Element {
    Bf16,
    F16,
}

/// A kernel, compiled in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Kernel {
    /// Its entry point.
    pub(crate) name: &'static str,
    pub(crate) source: Source,
    pub(crate) element: Element,
    /// What else its source is compiled with.
    pub(crate) defines: Defines,
}

/// Names and values of defines, up to six.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Defines([(&'static str, u32); 6]);

impl Defines {
    /// Returns `defines`, which are at most six.
    pub(crate) const fn of(defines: &[(&'static str, u32)]) -> Self {
        let (mut all, mut at) = ([("", 0); 6], 0);
        while at < defines.len() {
            all[at] = defines[at];
            at += 1;
        }
        Self(all)
    }

    /// Returns those of a linear, with that which says whether its rows are [`Pairs`].
    fn grouped(mut self, grouped: bool) -> Self {
        let free = self.0.iter_mut().find(|(name, _)| name.is_empty());
        *free.expect("linears have up to five") = ("GROUPED", u32::from(grouped));
        self
    }

    fn iter(&self) -> impl Iterator<Item = &(&'static str, u32)> {
        self.0.iter().filter(|(name, _)| !name.is_empty())
    }
}

/// What kernels are written in, as the device has it.
const DEVICE: (&str, &str) = ("device.cu", include_str!("kernels/device.cu"));
/// What several kernels share.
const COMMON: (&str, &str) = ("common.cu", include_str!("kernels/common.cu"));

impl Kernel {
    /// Returns the source to compile for a device.
    pub(crate) fn text(&self) -> String {
        self.text_over(DEVICE)
    }

    /// Returns the source over what `face` says the language of kernels is.
    pub(crate) fn text_over(&self, face: (&str, &str)) -> String {
        let mut text = format!("#define F16 {}\n", u32::from(self.element == Element::F16));
        self.defines.iter().for_each(|(name, value)| text += &format!("#define {name} {value}\n"));
        for (file, part) in [face, COMMON].iter().chain(self.source.files()) {
            text += &format!("#line 1 \"{file}\"\n{part}");
        }
        text
    }
}

/// A launch of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) kernel: Kernel,
    /// Blocks.
    pub(crate) grid: [u32; 3],
    /// Threads of a block.
    pub(crate) threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub(crate) shared_bytes: u32,
    pub(crate) args: Args,
}

/// The words of a kernel's arguments.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Args {
    words: [u64; Args::MOST],
    len: usize,
}

impl Args {
    const MOST: usize = 32;

    fn word(mut self, word: u64) -> Self {
        self.words[self.len] = word;
        self.len += 1;
        self
    }

    fn number(self, number: u32) -> Self {
        self.word(u64::from(number))
    }

    fn float(self, float: f32) -> Self {
        self.number(float.to_bits())
    }

    /// Returns them in order.
    pub(crate) fn words(&self) -> &[u64] {
        &self.words[..self.len]
    }
}

#[cfg(test)]
mod resources;
#[cfg(test)]
mod tests;
