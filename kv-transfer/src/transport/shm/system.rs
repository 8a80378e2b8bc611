//! What `shm` asks of the system: sealed memory files, descriptors that travel, processes that can be watched. Linux has it
//! all; elsewhere no pool counts as sealed, so none is ever shared.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
};

/// Files that travel together: a pool, and the words of its pages.
const FILES: usize = 2;

/// Names this boot of this machine: equal for all processes that could share memory.
pub(super) fn host() -> Option<String> {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|id| id.trim().to_owned())
}

#[cfg(target_os = "linux")]
pub(super) use linux::*;

#[cfg(target_os = "linux")]
mod linux {
    use super::*;
    use rustix::{
        fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, memfd_create},
        io::Errno,
        net::{
            RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
            recvmsg, sendmsg,
        },
        process::{Pid, PidfdFlags, pidfd_open},
    };
    use std::{
        io::{ErrorKind, IoSlice, IoSliceMut},
        mem::MaybeUninit,
        os::fd::{AsRawFd, BorrowedFd, FromRawFd},
    };

    /// Says whether nobody can change the size of `file` any more: then a map of it cannot lose its memory under its user.
    pub(in super::super) fn is_sealed(file: &File) -> bool {
        let needed = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW;
        fcntl_get_seals(file).is_ok_and(|seals| seals.contains(needed) && !seals.contains(SealFlags::WRITE))
    }

    /// Makes a file of `bytes` zeros in memory, whose size nobody can change.
    pub(in super::super) fn sealed_file(name: &str, bytes: usize) -> io::Result<File> {
        let file = File::from(memfd_create(name, MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC)?);
        file.set_len(bytes as u64)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(file)
    }

    /// Gives `bytes` of `file` from `at` on their memory, keeping what is there.
    pub(in super::super) fn allocate(file: &File, at: u64, bytes: u64) -> io::Result<()> {
        fallocate(file, FallocateFlags::empty(), at, bytes).map_err(io::Error::from)
    }

    /// Returns a descriptor that becomes readable when the process at the other end of `socket` is gone. Where the system names
    /// it only by number, that number may have been given to another by now: whoever asks must hear from the peer afterwards.
    pub(in super::super) fn process_of(socket: impl AsFd, pid: Option<i32>) -> io::Result<OwnedFd> {
        let mut fd: libc::c_int = -1;
        let mut length = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: both pointers are to locals of the size that is named.
        let got = unsafe {
            let (fd, length) = ((&raw mut fd).cast(), &raw mut length);
            libc::getsockopt(socket.as_fd().as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERPIDFD, fd, length)
        };
        if got == 0 {
            // SAFETY: the call succeeded, so that this is a new descriptor of which nobody else knows.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
        // Kernels before 6.5. A process of another pid namespace has no number here.
        let pid =
            pid.and_then(Pid::from_raw).ok_or_else(|| io::Error::other("the peer's process has no number here"))?;
        Ok(pidfd_open(pid, PidfdFlags::empty())?)
    }

    /// Sends `bytes` and with them `files`, on a socket whose buffer is empty.
    pub(in super::super) fn send_files(socket: impl AsFd, bytes: &[u8], files: [&File; FILES]) -> io::Result<()> {
        let files: [BorrowedFd<'_>; FILES] = files.map(AsFd::as_fd);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&files));
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)? {
            sent if sent == bytes.len() => Ok(()),
            _ => Err(ErrorKind::WriteZero.into()),
        }
    }

    /// Receives bytes and the files that came with them.
    pub(in super::super) fn receive_files(socket: impl AsFd, bytes: &mut [u8]) -> io::Result<(usize, [File; FILES])> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let message = match recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::AGAIN) => return Err(ErrorKind::WouldBlock.into()),
            message => message?,
        };
        // All are owned, and so closed, whatever is wrong with them.
        let mut files: Vec<OwnedFd> = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                files.extend(received);
            }
        }
        let passed = |files: Vec<_>| io::Error::other(format!("{FILES} files are wanted, {} were passed", files.len()));
        let files: [OwnedFd; FILES] = files.try_into().map_err(passed)?;
        Ok((message.bytes, files.map(File::from)))
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) use elsewhere::*;

#[cfg(not(target_os = "linux"))]
mod elsewhere {
    use super::*;

    pub(in super::super) fn is_sealed(_: &File) -> bool {
        false
    }

    pub(in super::super) fn allocate(_: &File, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(in super::super) fn process_of(_: impl AsFd, _: Option<i32>) -> io::Result<OwnedFd> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(in super::super) fn sealed_file(_: &str, _: usize) -> io::Result<File> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(in super::super) fn send_files(_: impl AsFd, _: &[u8], _: [&File; FILES]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(in super::super) fn receive_files(_: impl AsFd, _: &mut [u8]) -> io::Result<(usize, [File; FILES])> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
