//! What the system says is mapped in this process (`/proc/self/maps`).

use std::{fs, ops::Range, path::PathBuf};

/// Memory that is mapped as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Region {
    addresses: Range<usize>,
    /// Of `rwxs`, what holds.
    access: String,
    /// Of the file that is mapped.
    pub(super) path: PathBuf,
}

impl Region {
    /// Returns the one that holds `address`.
    pub(super) fn at(address: usize) -> Option<Self> {
        let maps = fs::read_to_string("/proc/self/maps").ok()?;
        maps.lines().filter_map(Self::of_line).find(|region| region.addresses.contains(&address))
    }

    fn of_line(line: &str) -> Option<Self> {
        // "7f1200000000-7f1210000000 rw-s 00000000 00:01 4711    /dev/shm/baton-ucx-7/ucx_shm_posix_2a"
        let mut fields = line.split_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let number = |text| usize::from_str_radix(text, 16).ok();
        let addresses = number(start)?..number(end)?;
        let access = fields.next()?.to_owned();
        Some(Self { addresses, access, path: fields.nth(3).unwrap_or_default().into() })
    }

    /// Says whether all of `bytes` from `start` on lie in it.
    pub(super) fn holds(&self, start: usize, bytes: usize) -> bool {
        let end = start.checked_add(bytes);
        self.addresses.contains(&start) && end.is_some_and(|end| end <= self.addresses.end)
    }

    /// Says whether what is written there others see.
    pub(super) fn is_shared(&self) -> bool {
        self.access.starts_with("rw") && self.access.ends_with('s')
    }

    /// Says whether it is a device's to take away.
    pub(super) fn is_of_device(&self) -> bool {
        self.path.starts_with("/dev") && !self.path.starts_with("/dev/shm")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions() {
        let check = |line, shared, device| {
            let region = Region::of_line(line).expect(line);
            assert_eq!((region.is_shared(), region.is_of_device()), (shared, device), "{line}");
            region
        };
        let posix = "7f1200000000-7f1210000000 rw-s 00000000 00:01 4711       /dev/shm/baton-ucx-7/ucx_shm_posix_2a";
        let region = check(posix, true, false);
        assert_eq!(region.path.to_str(), Some("/dev/shm/baton-ucx-7/ucx_shm_posix_2a"));
        let (start, bytes) = (0x7f12_0000_0000, 0x1000_0000);
        assert!(region.holds(start, bytes) && region.holds(start + bytes - 1, 1));
        assert!(!region.holds(start, bytes + 1) && !region.holds(start - 1, 1) && !region.holds(start, usize::MAX));
        check("7f1200000000-7f1210000000 rw-s 00000000 00:01 32769 /SYSV00000000 (deleted)", true, false);
        check("7f1200000000-7f1210000000 rw-s 00000000 00:06 1085 /dev/xpmem", true, true);
        check("7f1200000000-7f1210000000 r--s 00000000 00:01 4711 /dev/shm/other", false, false);
        assert_eq!(check("7f1200000000-7f1210000000 rw-p 00000000 00:00 0 ", false, false).path.to_str(), Some(""));
        assert_eq!(Region::of_line("nonsense"), None);
    }

    #[test]
    fn a_variable_lies_in_memory_of_this_process_alone() {
        let here = [0_u8; 8];
        let region = Region::at(here.as_ptr().addr()).expect("it is mapped");
        assert!(region.holds(here.as_ptr().addr(), here.len()) && !region.is_shared());
        assert_eq!(Region::at(8), None);
    }
}
