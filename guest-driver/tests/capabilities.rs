//! One test for each capability of the memory hotplug core: row S0-1 of the table is `s0_01_…`.
//!
//! | rows | from |
//! |---|---|
//! | S0, S3 | sub-section hotplug of device memory |
//! | S1 | boot memory and who may remove what |
//! | S2 | memory hotplug as its users see it |
//! | S4 | the sysfs files, and the zones a memory block may go to |
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

#[path = "capabilities/s0.rs"]
mod s0;
#[path = "capabilities/s1.rs"]
mod s1;
#[path = "capabilities/s2.rs"]
mod s2;
#[path = "capabilities/s3.rs"]
mod s3;
#[path = "capabilities/s4.rs"]
mod s4;
#[path = "capabilities/support.rs"]
mod support;
