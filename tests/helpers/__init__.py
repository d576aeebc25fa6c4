"""What tests share: tiny datasets, damage, and steps and runs of trainers. No module here is a test."""
