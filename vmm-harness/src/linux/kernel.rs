//! Which kernel the guest boots.

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use virtio_mem_driver::driver::Strategy;

use super::LinuxError;
use super::initramfs;
use super::packages::{LinuxKernel, Tools};
use super::qemu::Setup;

/// This project's kernel for QEMU, with the driver (`resources/guest-image`).
const OWN: &[u8] = include_bytes!(env!("VMEM_QEMU_GUEST_IMAGE"));

/// A kernel that answers on the console to tokens.
#[derive(Debug)]
pub(super) enum Kernel {
    /// Linux, with a shell.
    Linux(LinuxKernel),
    /// This project's, with its driver doing as the strategy says.
    Own(Strategy),
}

impl Kernel {
    /// What is used, for people.
    pub(super) fn versions(&self) -> Result<Vec<String>, LinuxError> {
        match self {
            Self::Linux(linux) => linux.versions(),
            Self::Own(strategy) => Ok(vec![format!("this project's kernel, {strategy:?} policy")]),
        }
    }

    /// Options of QEMU for the kernel. Files for it go to `dir`.
    pub(super) fn qemu_options(
        &self,
        tools: &Tools,
        dir: &Path,
    ) -> Result<Vec<OsString>, LinuxError> {
        match self {
            Self::Linux(linux) => {
                let initrd = dir.join("initramfs");
                initramfs::write(&initrd, &tools.busybox(), &linux.modules())?;
                Ok(vec![
                    "-kernel".into(),
                    linux.vmlinuz().into(),
                    "-initrd".into(),
                    initrd.into(),
                ])
            }
            Self::Own(_) => {
                let image = dir.join("kernel");
                fs::write(&image, OWN).map_err(LinuxError::file(&image))?;
                // Where it ends the machine.
                let exit = "isa-debug-exit,iobase=0xf4";
                Ok(vec![
                    "-kernel".into(),
                    image.into(),
                    "-device".into(),
                    exit.into(),
                ])
            }
        }
    }

    /// The kernel's command line, but for what the device adds.
    pub(super) fn options(&self, setup: &Setup) -> String {
        match self {
            Self::Linux(_) => {
                format!("console=ttyS0 panic=-1 quiet vmem.online={} ", setup.online)
            }
            Self::Own(Strategy::Direct) => "policy=direct ".into(),
            Self::Own(Strategy::Linux) => "policy=linux ".into(),
        }
    }

    /// What gives a person the console, until the guest ends.
    pub(super) fn prompt(&self) -> &'static str {
        match self {
            Self::Linux(_) => {
                "vmem stty echo onlcr </dev/console; PS1='guest# ' setsid cttyhack sh </dev/console \
                 >/dev/console 2>&1; poweroff -f\n"
            }
            Self::Own(_) => "vmem prompt\n",
        }
    }
}
