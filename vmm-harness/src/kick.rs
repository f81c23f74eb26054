//! Bringing a vCPU thread out of `KVM_RUN` by a signal.
//!
//! The handler sets `immediate_exit` of the thread's own vCPU, which it finds through a thread-local pointer:
//! a signal that arrives before `KVM_RUN` is called makes it return at once, one that arrives later interrupts
//! it.
#![expect(
    unsafe_code,
    reason = "a signal handler reaches the vCPU through a pointer, and pthread_kill is a C function"
)]

use std::cell::Cell;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ioctls::{VcpuExit, VcpuFd};
use libc::{c_int, c_void, pthread_t, siginfo_t};
use vmm_sys_util::errno;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    /// `immediate_exit` of the vCPU this thread runs. Constant initialiser and no destructor: a signal
    /// handler may look at it at any time.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: not null means that a `KickableVcpu` of this thread lives, and with it the mapping the
        // pointer leads into. This thread and its handler are the only ones of the process that access it.
        let flag = unsafe { AtomicU8::from_ptr(flag) };
        flag.store(1, Ordering::Relaxed);
    }
}

/// Installs the handler; the first call decides for the process.
pub(crate) fn install_handler() -> Result<(), errno::Error> {
    static INSTALLED: OnceLock<Result<(), errno::Error>> = OnceLock::new();
    *INSTALLED.get_or_init(|| register_signal_handler(SIGRTMIN(), on_kick))
}

/// A vCPU, on the thread that runs it.
#[derive(Debug)]
pub(crate) struct KickableVcpu {
    fd: VcpuFd,
    /// Also keeps this on its thread: a raw pointer is not `Send`.
    immediate_exit: *mut u8,
}

impl KickableVcpu {
    /// From here on this thread's kicks are for `fd`. One at a time per thread.
    pub(crate) fn new(mut fd: VcpuFd) -> Self {
        let immediate_exit = &raw mut fd.get_kvm_run().immediate_exit;
        IMMEDIATE_EXIT.set(immediate_exit);
        Self { fd, immediate_exit }
    }

    /// Forgets kicks so far.
    pub(crate) fn disarm(&self) {
        // SAFETY: it leads into the mapping of `self.fd`, see `on_kick`.
        let flag = unsafe { AtomicU8::from_ptr(self.immediate_exit) };
        flag.store(0, Ordering::Relaxed);
    }

    /// Runs the guest until something happens, or at once returns EINTR if kicked since
    /// [`disarm`](Self::disarm).
    pub(crate) fn run(&mut self) -> Result<VcpuExit<'_>, errno::Error> {
        self.fd.run()
    }

    pub(crate) fn fd(&mut self) -> &mut VcpuFd {
        &mut self.fd
    }
}

impl Drop for KickableVcpu {
    fn drop(&mut self) {
        // Before the mapping goes with `fd`.
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// A thread that is known to run: its vCPU is inside the gate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RunningThread(pthread_t);

impl RunningThread {
    pub(crate) fn current() -> Self {
        // SAFETY: has no preconditions.
        Self(unsafe { libc::pthread_self() })
    }

    pub(crate) fn kick(&self) {
        // SAFETY: the thread exists, the gate's lock keeps it inside while this is called.
        let error = unsafe { libc::pthread_kill(self.0, SIGRTMIN()) };
        if error != 0 {
            log::error!("cannot kick a vCPU: {}", errno::Error::new(error));
        }
    }
}
