//! Placeholder for the command line.

fn main() {}
