//! What the guest runs on.

use std::fmt;
use std::fs;
use std::io;

use kvm_ioctls::{Cap, Kvm};
use thiserror::Error;

const KVM_API_VERSION: i32 = 12;

/// What the guest runs on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// Virtual CPUs of KVM.
    Kvm {
        /// The module that does the work, `kvm_intel` for instance; `None` if none is loaded by such a name.
        module: Option<String>,
    },
    /// Threads of this process.
    InProcess {
        /// Why not KVM; `None` if nobody asked for it.
        reason: Option<KvmError>,
    },
}

/// Why KVM cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum KvmError {
    /// There is no device file, or it cannot be opened.
    #[error("/dev/kvm: {0}")]
    Open(String),
    /// Not the interface everybody uses since 2007.
    #[error("KVM has API version {0}, not {KVM_API_VERSION}")]
    ApiVersion(i32),
    /// Something this harness needs.
    #[error("KVM lacks {0}")]
    Missing(&'static str),
}

/// Opens KVM if it can be used.
///
/// # Errors
///
/// [`KvmError`] says why it cannot.
pub fn open_kvm() -> Result<Kvm, KvmError> {
    let open_error = |error: kvm_ioctls::Error| KvmError::Open(io::Error::from(error).to_string());
    let kvm = Kvm::new().map_err(open_error)?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION {
        return Err(KvmError::ApiVersion(version));
    }
    for (capability, name) in [
        (Cap::UserMemory, "user memory slots"),
        (Cap::ImmediateExit, "immediate_exit"),
        (Cap::Ioeventfd, "ioeventfd"),
    ] {
        if !kvm.check_extension(capability) {
            return Err(KvmError::Missing(name));
        }
    }
    Ok(kvm)
}

/// The loaded module that implements KVM, by the name the kernel knows it by.
#[must_use]
pub fn kvm_module() -> Option<String> {
    let mut names: Vec<String> = fs::read_dir("/sys/module")
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm_"))
        .collect();
    names.sort();
    names.into_iter().next()
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kvm {
                module: Some(module),
            } => write!(f, "KVM ({module})"),
            Self::Kvm { module: None } => write!(f, "KVM"),
            Self::InProcess {
                reason: Some(reason),
            } => write!(f, "in-process, because {reason}"),
            Self::InProcess { reason: None } => write!(f, "in-process, as asked"),
        }
    }
}
