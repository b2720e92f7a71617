//! The `rearview` command.
fn main() {}
