//! The `rearview` command: everything is in the library.

fn main() -> std::process::ExitCode {
    rearviewfs::cli::main()
}
