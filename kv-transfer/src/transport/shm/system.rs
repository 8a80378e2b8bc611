//! What `shm` asks of the system: sealed memory files, descriptors that travel, processes that can be watched. Linux has it
//! all; elsewhere no pool counts as sealed, so none is ever shared.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
};

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
        fs::{FallocateFlags, SealFlags, fallocate, fcntl_get_seals},
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
        os::fd::{AsRawFd, FromRawFd},
    };

    /// Says whether nobody can change the size of `file` any more: then a map of it cannot lose its memory under its user.
    pub(in super::super) fn is_sealed(file: &File) -> bool {
        let needed = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW;
        fcntl_get_seals(file).is_ok_and(|seals| seals.contains(needed) && !seals.contains(SealFlags::WRITE))
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

    /// Sends `bytes` and with them `file`, on a socket whose buffer is empty.
    pub(in super::super) fn send_file(socket: impl AsFd, bytes: &[u8], file: &File) -> io::Result<()> {
        let files = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&files));
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)? {
            sent if sent == bytes.len() => Ok(()),
            _ => Err(ErrorKind::WriteZero.into()),
        }
    }

    /// Receives bytes and the one file that came with them.
    pub(in super::super) fn receive_file(socket: impl AsFd, bytes: &mut [u8]) -> io::Result<(usize, File)> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
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
        match files.pop() {
            Some(file) if files.is_empty() => Ok((message.bytes, file.into())),
            _ => Err(io::Error::other("not one file was passed")),
        }
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

    pub(in super::super) fn send_file(_: impl AsFd, _: &[u8], _: &File) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    pub(in super::super) fn receive_file(_: impl AsFd, _: &mut [u8]) -> io::Result<(usize, File)> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
