"""Double DQN on Atari: the games, the replay, learning, and playing under attack (Sec. 4.2, App. A)."""
