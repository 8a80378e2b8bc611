//! Pages on a card: where they lie there, and how those that are handed off move.
//!
//! What leaves and what lands is moved by whoever hands it off, on threads of theirs: [`CardPages`] is what they are given. Pages whose other worker is on
//! a card as well, and within reach, go there straight; else they pass through [`KvMemory`], which is all that transports know: their blocks are fetched
//! from the card just before they are sent, and stored on it when they have come. What stays is never copied, and takes no memory on the host.

mod parts;

use super::{
    device::{Alive, Copier, Device, Elsewhere, Handle, Region, Run},
    kernels::{Element, Pages},
    lock,
    slice::Slice,
};
use crate::{Error, KvMemory};
use kv_cache::{Backing, Extent, PageLayout, PoolCopy, Reach};
use parts::Part;
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    hash::{BuildHasher, RandomState},
    sync::{Arc, Mutex, Weak},
};

/// Most bytes of a block: every device takes that many in a copy.
pub(super) const MOST_BLOCK_BYTES: usize = 8 << 20;

/// The pool of a device: of every page the keys and values of a rank's heads.
#[derive(Debug)]
pub(super) struct Pool {
    part: Part,
    region: Region,
    /// What kernels are told of each layer.
    pub(super) layers: Vec<Pages>,
}

impl Pool {
    /// Reserves the part of the pool of `all` that `slice` has.
    pub(super) fn reserve(
        device: &mut dyn Device,
        all: &PageLayout,
        slice: Slice,
        element: Element,
    ) -> Result<Self, Error> {
        let part = Part::new(all, slice);
        let layout = part.layout();
        if layout.block_bytes() > MOST_BLOCK_BYTES {
            let problem = format!(
                "{} tokens make blocks of {} bytes, and copies to the host take {MOST_BLOCK_BYTES} at a time",
                layout.page_tokens,
                layout.block_bytes()
            );
            return Err(Error::setting("page_tokens", problem));
        }
        let region = device.alloc("pages", layout.pool_bytes())?;
        let layers = (0..layout.layers as usize).map(|layer| Pages::new(layout, element, region.address, layer));
        let layers = layers.collect::<Result<_, _>>().map_err(|problem| Error::setting("device", problem))?;
        Ok(Self { part, region, layers })
    }

    /// Returns what others move its pages with.
    pub(super) fn side(&self, device: &mut dyn Device) -> Result<Side, Error> {
        let (card, alive) = (device.identity().1, device.alive());
        let copier = Mutex::new(device.copier()?);
        Ok(Side { part: self.part.clone(), region: self.region, card, alive, copier })
    }
}

/// The pages of one card.
#[derive(Debug)]
pub(super) struct Side {
    part: Part,
    region: Region,
    card: [u8; 16],
    alive: Alive,
    copier: Mutex<Box<dyn Copier>>,
}

impl Side {
    /// Does `what` with the copier, while the card is there.
    fn with<T>(&self, what: impl FnOnce(&mut dyn Copier) -> Result<T, Error>) -> Result<T, String> {
        let Some(_alive) = self.alive.hold() else { return Err(CLOSED.into()) };
        what(&mut **lock(&self.copier)).map_err(|error| error.to_string())
    }
}

const CLOSED: &str = "the engine that had the pages has ended";

/// The pages of an engine on cards, as hand-offs see them.
#[derive(Debug)]
pub(super) struct CardPages {
    memory: Arc<KvMemory>,
    sides: Vec<Side>,
    /// Names them in this process.
    number: u64,
    own: Weak<CardPages>,
}

/// Pages on cards of this process, by number.
static HERE: Mutex<Option<HashMap<u64, Weak<CardPages>>>> = Mutex::new(None);

/// What [`Backing::share`] tells.
#[derive(Debug, Serialize, Deserialize)]
struct Shared {
    number: u64,
    layout: PageLayout,
    cards: Vec<SharedCard>,
}

/// Where a card's part of pages is: a [`Handle`] in hexadecimal digits, or why there is none.
#[derive(Debug, Serialize, Deserialize)]
enum SharedCard {
    Handle(String),
    Problem(String),
}

impl CardPages {
    /// Makes them of the `sides` of an engine whose pool has the shape of `memory`.
    pub(super) fn new(memory: Arc<KvMemory>, sides: Vec<Side>) -> Arc<Self> {
        // Random for each one made.
        let number = RandomState::new().hash_one(0);
        let pages = Arc::new_cyclic(|own| Self { memory, sides, number, own: own.clone() });
        lock(&HERE).get_or_insert_default().insert(number, Arc::downgrade(&pages));
        pages
    }

    fn layout(&self) -> &PageLayout {
        self.memory.layout()
    }

    /// Returns where `extents` are on a card, each piece with its offset in the pool.
    fn pieces(&self, side: &Side, extents: &[Extent]) -> (Vec<usize>, Vec<Region>) {
        let mut pieces = (Vec::new(), Vec::new());
        for extent in extents {
            side.part.each(self.layout(), *extent, |at, offset, bytes| {
                pieces.0.push(at);
                pieces.1.push(side.region.part(offset, bytes));
            });
        }
        pieces
    }
}

impl Drop for CardPages {
    fn drop(&mut self) {
        lock(&HERE).get_or_insert_default().remove(&self.number);
    }
}

impl Backing for CardPages {
    fn fetch(&self, extents: &[Extent]) -> Result<(), String> {
        for side in self.sides.iter().filter(|side| side.part.leads()) {
            let (places, regions) = self.pieces(side, extents);
            side.with(|copier| {
                copier.fetch(&regions, &mut |index, bytes| {
                    // SAFETY: the piece lies in the pool, because its extent does and `each` cuts nothing but that; the hand-off protocol has frozen the page, so nobody
                    // writes it there but with the same bytes.
                    unsafe {
                        let to = self.memory.as_mut_ptr().add(places[index]);
                        to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len());
                    }
                })
            })?;
        }
        Ok(())
    }

    fn store(&self, extents: &[Extent]) -> Result<(), String> {
        for side in &self.sides {
            let (places, regions) = self.pieces(side, extents);
            side.with(|copier| {
                copier.store(&regions, &mut |index, bytes| {
                    // SAFETY: likewise; whoever wrote the page has said that it is done.
                    unsafe {
                        let from = self.memory.as_mut_ptr().add(places[index]);
                        bytes.as_mut_ptr().copy_from_nonoverlapping(from, bytes.len());
                    }
                })
            })?;
        }
        Ok(())
    }

    fn share(&self) -> Result<String, String> {
        let card = |side: &Side| match side.with(|copier| copier.share(side.region)) {
            Ok(handle) => SharedCard::Handle(handle.map(|byte| format!("{byte:02x}")).concat()),
            Err(problem) => SharedCard::Problem(problem),
        };
        let cards = self.sides.iter().map(card).collect();
        let shared = Shared { number: self.number, layout: self.layout().clone(), cards };
        serde_json::to_string(&shared).map_err(|error| error.to_string())
    }

    fn reach(&self, shared: &str) -> Result<Arc<dyn Reach>, String> {
        let shared: Shared =
            serde_json::from_str(shared).map_err(|error| format!("what says where the pages are: {error}"))?;
        let here = lock(&HERE).get_or_insert_default().get(&shared.number).and_then(Weak::upgrade);
        let from = self.own.upgrade().expect("it is borrowed");
        let ranks = shared.cards.len();
        let parts = (0..ranks).map(|rank| Part::checked(&shared.layout, Slice { rank, ranks }));
        let parts =
            parts.collect::<Option<Vec<_>>>().ok_or("what says where the pages are: as many cards do not share it")?;
        let mut reached = Reached { from, here, layout: shared.layout, parts, addresses: Vec::new() };
        for side in &self.sides {
            let mut addresses = Vec::new();
            for (rank, (part, card)) in reached.parts.iter().zip(&shared.cards).enumerate() {
                if !side.part.leads() || !side.part.meets(part) {
                    addresses.push(None);
                    continue;
                }
                let address = match (&reached.here, card) {
                    (Some(here), _) => {
                        let Side { card, region, .. } = here.sides.get(rank).ok_or("it has fewer cards")?;
                        side.with(|copier| copier.reach(Elsewhere::Here(*card, region.address)))
                    }
                    (None, SharedCard::Handle(digits)) => {
                        let handle = handle(digits).ok_or("what says where the pages are: no handle")?;
                        side.with(|copier| copier.reach(Elsewhere::There(&handle)))
                    }
                    (None, SharedCard::Problem(problem)) => Err(problem.clone()),
                };
                match address {
                    Ok(address) => addresses.push(Some(address)),
                    Err(problem) => {
                        // What was reached is left when this is dropped.
                        reached.addresses.push(addresses);
                        return Err(problem);
                    }
                }
            }
            reached.addresses.push(addresses);
        }
        Ok(Arc::new(reached))
    }
}

/// Reads a handle of hexadecimal digits.
fn handle(digits: &str) -> Option<Handle> {
    let bytes = (0..digits.len() / 2).map(|at| u8::from_str_radix(digits.get(2 * at..2 * at + 2)?, 16).ok());
    bytes.collect::<Option<Vec<u8>>>()?.try_into().ok()
}

/// Another's pages on cards.
#[derive(Debug)]
struct Reached {
    /// Who copies.
    from: Arc<CardPages>,
    /// Whose they are, if they are of this process.
    here: Option<Arc<CardPages>>,
    layout: PageLayout,
    /// By card of theirs.
    parts: Vec<Part>,
    /// By card of ours and of theirs: where ours has theirs, if it has something for it.
    addresses: Vec<Vec<Option<u64>>>,
}

impl Reach for Reached {
    fn write(&self, copies: &[PoolCopy]) -> Result<(), String> {
        // Of another process the protocol says that it waits.
        let theirs = self.here.iter().flat_map(|here| &here.sides).map(|side| side.alive.hold());
        let _alive = theirs.collect::<Option<Vec<_>>>().ok_or(CLOSED)?;
        for (side, addresses) in self.from.sides.iter().zip(&self.addresses) {
            let mut runs = Vec::new();
            for (part, address) in self.parts.iter().zip(addresses) {
                let Some(address) = address else { continue };
                for copy in copies {
                    side.part.each(self.from.layout(), copy.from(), |at, here, bytes| {
                        let target = Extent { offset: copy.target + (at - copy.source), bytes };
                        part.each(&self.layout, target, |place, there, bytes| {
                            let from = side.region.part(here + (place - target.offset), bytes).address;
                            runs.push(Run { from, to: address + there as u64, bytes: bytes as u64 });
                        });
                    });
                }
            }
            if !runs.is_empty() {
                side.with(|copier| copier.copy(&runs))?;
            }
        }
        Ok(())
    }
}

impl Drop for Reached {
    fn drop(&mut self) {
        if self.here.is_some() {
            return;
        }
        for (side, addresses) in self.from.sides.iter().zip(&self.addresses) {
            // Where our card has ended, the addresses have ended with it.
            let _ = side.with(|copier| {
                addresses.iter().flatten().for_each(|address| copier.leave(*address));
                Ok(())
            });
        }
    }
}
