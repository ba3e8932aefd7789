//! `migvisor`: parse the command line, dispatch; nothing else.

fn main() {}
