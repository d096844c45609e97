//! The binary; commands come with the services.

fn main() {}
